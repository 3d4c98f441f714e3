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
from typing import TYPE_CHECKING, Any, NamedTuple

from instructgpt_hf.artifacts import EVALUATION_FILES, LICENSE_KEYS, STAGE_FOLDERS, StageArtifact, finished_stages
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.hub.markdown import environment, squeeze
from instructgpt_hf.hub.results import index_entries, result_rows
from instructgpt_hf.hub.sources import bare_name, is_generated, is_repo_id, public_artifact

if TYPE_CHECKING:
    from huggingface_hub import ModelCard, ModelCardData

# Template, title and tags by stage, and of a policy's value model.
_PARTS = {
    "sft": ("sft.md", "supervised fine-tuning (stage 1 of 3)", ["trl", "sft"]),
    "reward": ("reward.md", "reward model (stage 2 of 3)", ["trl", "reward-trainer", "reward-model", "rlhf"]),
    "ppo": ("ppo.md", "PPO policy (stage 3 of 3)", ["trl", "ppo", "rlhf"]),
    "ppo-ptx": ("ppo.md", "PPO-ptx policy (stage 3 of 3)", ["trl", "ppo", "ppo-ptx", "rlhf"]),
    "value": ("value.md", "value model of the policy", ["trl", "ppo", "value-model", "rlhf"]),
}
# The source of a default: a section of the paper, another source, or "ours".
_SOURCE = re.compile(r"(ours|TRL|paper|App|section|§|[A-F]\.\d)", re.IGNORECASE)
_BOOKKEEPING = ("report_to", "save_", "logging_", "disable_tqdm", "run_name", "rollout_log_samples", "hub_", "push_to")
_ADAPTER_SETTINGS = ("lora_", "use_bnb_")
# Label by role of a dataset, in the order of the card.
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
    artifact: StageArtifact,
    *,
    repo_id: str | None = None,
    links: dict[str, str] | None = None,
    value_model: bool = False,
) -> ModelCard:
    """The model card of one stage, or of a policy's value model.

    Args:
        artifact: the stage's record; local paths in it appear as their last component only.
        repo_id: the Hub id the card will live under; the usage example loads it.
        links: Hub ids of the other models of the run, by stage (`"sft"`, `"reward"`, `"ppo"`, `"ppo-ptx"`), `"value"`
            for this policy's value model, `"base"` for a base model pushed apart, `"adapter_base"` for the model an
            adapter needs.
        value_model: whether the card is that of the value model of the policy in `artifact`.

    Returns:
        A card whose metadata the Hub accepts. Facts missing from the record are left out.

    Raises:
        InstructGPTError: if the record's stage is unknown, or has no value model where its card is wanted.
    """
    from huggingface_hub import ModelCard

    if artifact.stage not in STAGE_FOLDERS or (value_model and artifact.stage in ("sft", "reward")):
        raise InstructGPTError(
            f"{artifact.stage!r}: there is no card for this stage; stages are {', '.join(STAGE_FOLDERS)}."
        )
    links = links or {}
    subject = _Subject(public_artifact(artifact, links), repo_id, links, value_model)
    body = environment().get_template(_PARTS[subject.part][0]).render(_context(subject))
    return ModelCard(f"---\n{_metadata(subject).to_yaml()}\n---\n\n{squeeze(body)}\n")


class _Subject(NamedTuple):
    """The model that a card describes: its public record, and the arguments of `render_card`."""

    artifact: StageArtifact
    repo_id: str | None
    links: dict[str, str]
    value_model: bool

    @property
    def part(self) -> str:
        return "value" if self.value_model else self.artifact.stage

    @property
    def local_name(self) -> str:
        return f"{self.artifact.recipe}-{self.artifact.stage}{'-value' if self.value_model else ''}"

    @property
    def is_adapter(self) -> bool:
        # The record describes the policy, whose value model may be saved in the other form.
        return "adapter_base" in self.links if self.value_model else self.artifact.model.get("kind") == "adapter"

    @property
    def has_own_base(self) -> bool:
        """Whether this is a reward model that started from another pretrained model than the SFT model."""
        return self.artifact.stage == "reward" and bool(self.artifact.config.get("model_name_or_path"))


def _metadata(subject: _Subject) -> ModelCardData:
    """The YAML header, with the Hub's keys, Hub ids and Python numbers only."""
    from huggingface_hub import ModelCardData

    artifact, base = subject.artifact, _base_model(subject)
    datasets = [item.get("source") for item in artifact.data.values()]
    results = [] if subject.value_model else index_entries(artifact)
    return ModelCardData(
        **_license(artifact),
        library_name="peft" if subject.is_adapter else "transformers",
        pipeline_tag={"reward": "text-classification", "value": None}.get(subject.part, "text-generation"),
        tags=[*_PARTS[subject.part][2], "instructgpt", "instructgpt-hf"],
        base_model=base,
        base_model_relation=None if base is None else "adapter" if subject.is_adapter else "finetune",
        datasets=list(dict.fromkeys(item for item in datasets if is_repo_id(item) and "/" in item)) or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=subject.repo_id.split("/")[-1] if subject.repo_id else subject.local_name,
        eval_results=results or None,
    )


def _license(artifact: StageArtifact) -> dict[str, Any]:
    """The base model's licence as the Hub's keys hold it: a name and a link stand beside `other` only."""
    stated = {key: value for key in LICENSE_KEYS if isinstance(value := artifact.model.get(key), str) and value}
    link, base = stated.get("license_link"), artifact.base_model.get("id")
    if link is not None and "://" not in link:
        # A file in the base model's repository.
        on_hub = is_repo_id(base) and ("/" in base or artifact.base_model.get("revision"))
        revision = artifact.base_model.get("revision") or "main"
        file = f"https://huggingface.co/{base}/blob/{revision}/{link.removeprefix('./')}"
        stated["license_link"] = file if on_hub else ""
    return {key: stated.get(key) or None for key in LICENSE_KEYS}


def _base_model(subject: _Subject) -> str | None:
    """Hub id for the card's `base_model`: what an adapter needs, else the nearest earlier stage or the base model."""
    base, previous = subject.artifact.base_model, subject.artifact.previous
    candidates = [base.get("id")]
    if subject.is_adapter:
        candidates = [subject.links.get("adapter_base", base.get("id"))]
    elif subject.part != "sft" and not subject.has_own_base:
        candidates.insert(0, previous.get("reward" if subject.value_model else "sft", {}).get("source"))
    # Ids without a namespace count only for a base model with a revision.
    bare = base.get("id") if base.get("revision") else None
    return next((item for item in candidates if is_repo_id(item) and ("/" in item or item == bare)), None)


class _Facts(dict[str, Any]):
    """A dictionary of a record in which missing keys read as None."""

    def __missing__(self, key: str) -> None:
        return None


def _context(subject: _Subject) -> dict[str, Any]:
    artifact, adapter = subject.artifact, subject.is_adapter
    known, other = result_rows(artifact.metrics, artifact.stage)
    sections = ("config", "prompt_format", "base_model", "model", "metrics", "training", "hardware")
    facts: dict[str, Any] = {name: _Facts(getattr(artifact, name)) for name in sections}
    defaults = {key: _with_source(value) for key, value in artifact.paper_defaults.items()}
    name = subject.repo_id.split("/")[-1] if subject.repo_id else artifact.recipe
    return {
        "artifact": dataclasses.replace(artifact, **facts),
        "title": f"{name}: {_PARTS[subject.part][1]}",
        "model_id": subject.repo_id or subject.local_name,
        "has_repo": subject.repo_id is not None,
        "adapter": adapter,
        "own_base": subject.has_own_base,
        "has_average": bool(artifact.config.get("ema_decay", defaults.get("ema_decay", (None, ""))[0])),
        "format": _Facts(artifact.prompt_format),
        "base": _described(artifact.base_model.get("id"), artifact.base_model.get("revision")),
        "adapter_base": subject.links.get("adapter_base"),
        "settings": [(key, value) for key, value in sorted(artifact.config.items()) if _is_relevant(key, adapter)],
        # A default of None means that a feature is not used; the card lists used ones only.
        "defaults": [
            (key, default, source)
            for key, (default, source) in sorted(defaults.items())
            if default is not None and _is_relevant(key, adapter)
        ],
        "datasets": _datasets(artifact),
        "known_results": known,
        "other_results": other,
        "lineage": _lineage(subject),
        "links": subject.links,
        "versions": sorted(artifact.versions.items()),
    }


def _is_relevant(key: str, adapter: bool) -> bool:
    """Whether a setting affects the model, unlike those of logging, saving and adapters that are not used."""
    return not key.startswith(_BOOKKEEPING) and (adapter or not key.startswith(_ADAPTER_SETTINGS))


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
    """Label, source, split, rows, fingerprint and other counts of each dataset, in a fixed order of roles."""
    shown, main = [], ("split", "rows", "fingerprint")
    for role in [*(role for role in _ROLES if role in artifact.data), *sorted(set(artifact.data) - set(_ROLES))]:
        item = artifact.data[role]
        extra = [
            (key.replace("_", " "), value)
            for key, value in sorted(item.items())
            if key not in ("source", *main) and isinstance(value, (int, float, str))
        ]
        label, source = _ROLES.get(role, role.capitalize()), _described_dataset(item.get("source"))
        shown.append({"label": label, "source": source, "extra": extra} | {key: item.get(key) for key in main})
    return shown


def _with_source(value: Any) -> tuple[Any, str]:
    """Default and source from `[default, source]`, `{"default", "source"}` or a default alone."""
    if isinstance(value, dict) and set(value) == {"default", "source"}:
        return value["default"], str(value["source"] or "")
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    if pair and isinstance(value[1], str) and _SOURCE.match(value[1]):
        return value[0], value[1]
    return value, ""


def _lineage(subject: _Subject) -> list[tuple[str, str]]:
    """Label and description of the other models of the run, as far as they are known."""
    artifact, links = subject.artifact, subject.links
    lines = [("Base model", _described(artifact.base_model.get("id"), artifact.base_model.get("revision")))]
    for stage, label in (("sft", "SFT model"), ("reward", "Reward model")):
        item = artifact.previous.get(stage, {})
        source = links.get(stage) or item.get("source")
        suffix = f", fingerprint `{item['fingerprint']}`" if item.get("fingerprint") else ""
        if stage != subject.part and source:
            lines.append((label, _described(source) + suffix))
    others = {"ppo": "PPO policy", "ppo-ptx": "PPO-ptx policy", "value": "Value model of this policy"}
    lines += [(label, _described(links.get(part))) for part, label in others.items() if part != subject.part]
    return [(label, text) for label, text in lines if text]


def write_cards(run_folder: str | Path, out_dir: str | Path) -> list[Path]:
    """Write `<stage>.stage.json` and `<stage>.md` for every finished stage of a run.

    The record is written without local paths and without the training log, which no card shows. A stage's evaluation
    files are copied.

    Raises:
        InstructGPTError: if no stage of the run is finished.
    """
    run, out = Path(run_folder), Path(out_dir)
    finished = finished_stages(run)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for stage in finished:
        artifact = public_artifact(StageArtifact.load(run / stage), as_trained=True)
        training = {key: value for key, value in artifact.training.items() if key != "log"}
        record, card = out / f"{stage}.stage.json", out / f"{stage}.md"
        record.write_text(dataclasses.replace(artifact, training=training).text(), encoding="utf-8")
        card.write_text(card_of_record(record), encoding="utf-8")
        shown = [run / stage / name for name in EVALUATION_FILES if (run / stage / name).is_file()]
        written += [record, card, *(Path(shutil.copy(path, out)) for path in shown)]
    return written


def card_of_record(path: str | Path) -> str:
    """The text of the card rendered from a `<stage>.stage.json` file."""
    return str(render_card(StageArtifact(**json.loads(Path(path).read_text(encoding="utf-8")))))


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
