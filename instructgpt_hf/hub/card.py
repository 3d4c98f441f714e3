"""Model cards, rendered from `stage.json` and nothing else.

`python -m instructgpt_hf.hub.card RUN_FOLDER OUT_DIR` writes the card of every finished stage of a run, with its
record and the evaluation files that the card shows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructgpt_hf.artifacts import STAGE_FILE, STAGE_FOLDERS, StageArtifact
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.hub.markdown import environment, squeeze
from instructgpt_hf.hub.results import index_entries, result_rows
from instructgpt_hf.hub.sources import bare_name, is_generated, is_repo_id, public_artifact

if TYPE_CHECKING:
    from huggingface_hub import ModelCard, ModelCardData

_TEMPLATE_OF = {"sft": "sft.md", "reward": "reward.md", "ppo": "ppo.md", "ppo-ptx": "ppo.md", "value": "value.md"}
_TITLES = {
    "sft": "supervised fine-tuning (stage 1 of 3)",
    "reward": "reward model (stage 2 of 3)",
    "ppo": "PPO policy (stage 3 of 3)",
    "ppo-ptx": "PPO-ptx policy (stage 3 of 3)",
    "value": "value model of the policy",
}
_TAGS = {
    "sft": ["trl", "sft"],
    "reward": ["trl", "reward-trainer", "reward-model", "rlhf"],
    "ppo": ["trl", "ppo", "rlhf"],
    "ppo-ptx": ["trl", "ppo", "ppo-ptx", "rlhf"],
    "value": ["trl", "ppo", "value-model", "rlhf"],
}
# The source of a default: a section of the paper, another source, or "ours".
_SOURCE = re.compile(r"(ours|TRL|paper|App|section|§|[A-F]\.\d)", re.IGNORECASE)
_BOOKKEEPING = ("report_to", "save_", "logging_", "disable_tqdm", "run_name", "rollout_log_samples", "hub_", "push_to")
_ADAPTER_SETTINGS = ("lora_", "use_bnb_")
# Files of the reward stage's evaluation, which its card shows and names.
_EVALUATION_FILES = ("evaluation.json", "evaluation.png")
_ROLES = {
    "demonstrations": "Demonstrations",
    "demonstrations_test": "Demonstrations, held back",
    "rankings": "Rankings",
    "rankings_test": "Rankings, held back",
    "prompts": "Prompts",
    "prompts_test": "Prompts, held back",
    "pretraining": "Pretraining text",
    "pretraining_test": "Pretraining text, held back",
}


def render_card(
    artifact: StageArtifact, *, repo_id: str | None = None, links: dict[str, str] | None = None
) -> ModelCard:
    """The model card of one stage.

    Args:
        artifact: the stage's record; local paths in it appear as their last component only.
        repo_id: the Hub id the card will live under; the usage example loads it.
        links: Hub ids of the other models of the run, by stage (`"sft"`, `"reward"`, `"ppo"`, `"ppo-ptx"`), `"value"`
            for this policy's value model, `"base"` for a base model pushed apart, `"adapter_base"` for the model an
            adapter needs.

    Returns:
        A card whose metadata the Hub accepts. Facts missing from the record are left out.

    Raises:
        InstructGPTError: if the record's stage is unknown.
    """
    return _render(artifact, artifact.stage, repo_id, links)


def render_value_card(
    artifact: StageArtifact, *, repo_id: str | None = None, links: dict[str, str] | None = None
) -> ModelCard:
    """The card of a policy's value model, from the policy's record; the arguments are those of `render_card`."""
    return _render(artifact, "value", repo_id, links)


def _render(artifact: StageArtifact, part: str, repo_id: str | None, links: dict[str, str] | None) -> ModelCard:
    from huggingface_hub import ModelCard

    if artifact.stage not in STAGE_FOLDERS or (part == "value" and artifact.stage in ("sft", "reward")):
        raise InstructGPTError(
            f"{artifact.stage!r}: there is no card for this stage; stages are {', '.join(STAGE_FOLDERS)}."
        )
    links = dict(links or {})
    shown = public_artifact(artifact, links)
    body = environment().get_template(_TEMPLATE_OF[part]).render(_context(shown, part, repo_id, links))
    metadata = _metadata(shown, part, repo_id, links)
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{squeeze(body)}\n")


def _metadata(artifact: StageArtifact, part: str, repo_id: str | None, links: dict[str, str]) -> ModelCardData:
    """The YAML header, with the Hub's keys, Hub ids and Python numbers only."""
    from huggingface_hub import ModelCardData

    adapter = _is_adapter(artifact, part, links)
    base = _base_model(artifact, part, links)
    datasets = [item.get("source") for item in artifact.data.values()]
    repo_ids = [source for source in datasets if is_repo_id(source) and "/" in source]
    results = [] if part == "value" else index_entries(artifact)
    metrics = sorted({result.metric_type for result in results})
    name = repo_id.split("/")[-1] if repo_id else f"{artifact.recipe}-{_suffix(artifact, part)}"
    return ModelCardData(
        license=_license(artifact),
        library_name="peft" if adapter else "transformers",
        pipeline_tag={"reward": "text-classification", "value": None}.get(part, "text-generation"),
        tags=[*_TAGS[part], "instructgpt", "instructgpt-hf"],
        base_model=base,
        base_model_relation=None if base is None else "adapter" if adapter else "finetune",
        datasets=list(dict.fromkeys(repo_ids)) or None,
        metrics=metrics or None,
        model_name=name,
        eval_results=results or None,
    )


def _license(artifact: StageArtifact) -> str | None:
    value = artifact.model.get("license") or artifact.config.get("license")
    return value if isinstance(value, str) and value else None


def _base_model(artifact: StageArtifact, part: str, links: dict[str, str]) -> str | None:
    """Hub id of the model that an adapter needs, or else of the nearest earlier stage or the base model."""
    candidates = [artifact.base_model.get("id")]
    if _is_adapter(artifact, part, links):
        candidates = [links.get("adapter_base"), *candidates]
    elif part == "value":
        candidates.insert(0, artifact.previous.get("reward", {}).get("source"))
    elif part != "sft" and not _own_base(artifact):
        candidates.insert(0, artifact.previous.get("sft", {}).get("source"))
    return next((source for source in candidates if _on_hub(source, artifact.base_model)), None)


def _on_hub(source: Any, base_model: dict[str, Any]) -> bool:
    """Whether `source` is a Hub id. Ids without a namespace count only for a base model with a revision."""
    is_base = source == base_model.get("id") and bool(base_model.get("revision"))
    return is_repo_id(source) and ("/" in source or is_base)


class _Facts(dict[str, Any]):
    """A dictionary of a record in which missing keys read as None."""

    def __missing__(self, key: str) -> None:
        return None


def _context(artifact: StageArtifact, part: str, repo_id: str | None, links: dict[str, str]) -> dict[str, Any]:
    known, other = result_rows(artifact.metrics, artifact.stage)
    sections = ("config", "prompt_format", "base_model", "model", "metrics", "training", "hardware")
    adapter = _is_adapter(artifact, part, links)
    facts: dict[str, Any] = {name: _Facts(getattr(artifact, name)) for name in sections}
    return {
        "artifact": dataclasses.replace(artifact, **facts),
        "title": f"{repo_id.split('/')[-1] if repo_id else artifact.recipe}: {_TITLES[part]}",
        "model_id": repo_id or f"{artifact.recipe}-{_suffix(artifact, part)}",
        "has_repo": repo_id is not None,
        "adapter": adapter,
        "own_base": _own_base(artifact),
        "has_average": bool(_setting(artifact, "ema_decay")),
        "format": _Facts(artifact.prompt_format),
        "base": _described(artifact.base_model.get("id"), artifact.base_model.get("revision")),
        "adapter_base": links.get("adapter_base"),
        "settings": [(key, value) for key, value in sorted(artifact.config.items()) if _is_relevant(key, adapter)],
        # A default of None means that a feature is not used; the card lists used ones only.
        "defaults": [
            (key, default, source)
            for key, (default, source) in sorted((key, _with_source(v)) for key, v in artifact.paper_defaults.items())
            if default is not None and _is_relevant(key, adapter)
        ],
        "datasets": _datasets(artifact),
        "known_results": known,
        "other_results": other,
        "lineage": _lineage(artifact, part, links),
        "links": links,
        "versions": sorted(artifact.versions.items()),
    }


def _is_adapter(artifact: StageArtifact, part: str, links: dict[str, str]) -> bool:
    # The record describes the policy, whose value model may be saved in the other form.
    return "adapter_base" in links if part == "value" else artifact.model.get("kind") == "adapter"


def _is_relevant(key: str, adapter: bool) -> bool:
    """Whether a setting affects the model, unlike those of logging, saving and adapters that are not used."""
    if key.startswith(_BOOKKEEPING):
        return False
    return adapter or not key.startswith(_ADAPTER_SETTINGS)


def _own_base(artifact: StageArtifact) -> bool:
    """Whether this is a reward model that started from another pretrained model than the SFT model."""
    return artifact.stage == "reward" and bool(artifact.config.get("model_name_or_path"))


def _setting(artifact: StageArtifact, key: str) -> Any:
    """The value of a setting, changed or at this package's default; None if the record does not hold it."""
    return artifact.config.get(key, _with_source(artifact.paper_defaults.get(key))[0])


def _suffix(artifact: StageArtifact, part: str) -> str:
    return f"{artifact.stage}-value" if part == "value" else artifact.stage


def _described(source: Any, revision: Any = None) -> str:
    """A Hub id as a link; any other source as code with a note."""
    if not isinstance(source, str) or not source:
        return ""
    if is_generated(source):
        return f"`{source}` (generated by instructgpt-hf)"
    if is_repo_id(source) and ("/" in source or revision):
        at = f" at revision `{revision}`" if revision else ""
        return f"[{source}](https://huggingface.co/{source}){at}"
    return f"`{bare_name(source)}` (local, not on the Hub)"


def _described_dataset(source: Any) -> str:
    if is_repo_id(source) and "/" in source:
        return f"[{source}](https://huggingface.co/datasets/{source})"
    return _described(source)


def _datasets(artifact: StageArtifact) -> list[dict[str, Any]]:
    """For each dataset role in a fixed order: label, source, split, rows, fingerprint and the other counts."""
    order = {role: index for index, role in enumerate(_ROLES)}
    shown = []
    for role in sorted(artifact.data, key=lambda name: (order.get(name, len(order)), name)):
        item = artifact.data[role]
        extra = [
            (key.replace("_", " "), value)
            for key, value in sorted(item.items())
            if key not in ("source", "split", "rows", "fingerprint") and isinstance(value, (int, float, str))
        ]
        shown.append(
            {
                "label": _ROLES.get(role, role.capitalize()),
                "source": _described_dataset(item.get("source")),
                "split": item.get("split"),
                "rows": item.get("rows"),
                "fingerprint": item.get("fingerprint"),
                "extra": extra,
            }
        )
    return shown


def _with_source(value: Any) -> tuple[Any, str]:
    """Default and source from `[default, source]`, `{"default", "source"}` or a default alone."""
    if isinstance(value, dict) and set(value) == {"default", "source"}:
        return value["default"], str(value["source"] or "")
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    if pair and isinstance(value[1], str) and _SOURCE.match(value[1]):
        return value[0], value[1]
    return value, ""


def _lineage(artifact: StageArtifact, part: str, links: dict[str, str]) -> list[tuple[str, str]]:
    """Label and description of the other models of the run, as far as they are known."""
    base = _described(artifact.base_model.get("id"), artifact.base_model.get("revision"))
    lines = [("Base model", base)]
    for stage, label in (("sft", "SFT model"), ("reward", "Reward model")):
        item = artifact.previous.get(stage, {})
        source = links.get(stage) or item.get("source")
        suffix = f", fingerprint `{item['fingerprint']}`" if item.get("fingerprint") else ""
        if stage != part and source:
            lines.append((label, _described(source) + suffix))
    for stage, label in (("ppo", "PPO policy"), ("ppo-ptx", "PPO-ptx policy")):
        if stage in links and (stage != artifact.stage or part == "value"):
            lines.append((label, _described(links[stage])))
    if "value" in links and part != "value":
        lines.append(("Value model of this policy", _described(links["value"])))
    return [(label, text) for label, text in lines if text]


def write_cards(run_folder: str | Path, out_dir: str | Path) -> list[Path]:
    """Write `<stage>.stage.json` and `<stage>.md` for every finished stage of a run.

    The record is written without local paths and without the training log, which no card shows. A stage's evaluation
    files are copied.

    Raises:
        InstructGPTError: if no stage of the run is finished.
    """
    run, out = Path(run_folder), Path(out_dir)
    finished = [stage for stage in STAGE_FOLDERS if (run / stage / STAGE_FILE).is_file()]
    if not finished:
        raise InstructGPTError(
            f"{run}: no finished stage here (none of {', '.join(STAGE_FOLDERS)} holds {STAGE_FILE})."
        )
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for stage in finished:
        artifact = public_artifact(StageArtifact.load(run / stage), is_local=lambda source: Path(source).exists())
        training = {key: value for key, value in artifact.training.items() if key != "log"}
        saved = dataclasses.replace(artifact, training=training).save(out)
        record = saved.replace(out / f"{stage}.stage.json")
        card = out / f"{stage}.md"
        card.write_text(card_of_record(record), encoding="utf-8")
        shown = [run / stage / name for name in _EVALUATION_FILES if (run / stage / name).is_file()]
        written += [record, card, *(Path(shutil.copy(path, out)) for path in shown)]
    return written


def card_of_record(path: str | Path) -> str:
    """The text of the card rendered from a `<stage>.stage.json` file."""
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    return str(render_card(StageArtifact(**values)))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this module; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m instructgpt_hf.hub.card", description=write_cards.__doc__)
    parser.add_argument("run_folder", help="folder of a finished run, such as runs/tiny-cpu")
    parser.add_argument("out_dir", help="where the cards and their records go, such as model_cards")
    arguments = parser.parse_args(argv)
    try:
        for path in write_cards(arguments.run_folder, arguments.out_dir):
            print(path)
    except InstructGPTError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
