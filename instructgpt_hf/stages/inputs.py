"""Models and earlier stages that a stage reads, and their limits, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import metadata_load
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from instructgpt_hf._compat.peft import unwrap_peft
from instructgpt_hf.artifacts import (
    LICENSE_KEYS,
    STAGE_FILE,
    StageArtifact,
    model_fingerprint,
    source_place,
    vocabulary_fingerprint,
)
from instructgpt_hf.config.data import PLAIN_TEMPLATES
from instructgpt_hf.config.model import quantization_config
from instructgpt_hf.config.recipe import StageSettings
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.errors import InstructGPTError, Problems
from instructgpt_hf.models.loading import count_parameters, load_config, load_tokenizer, positions
from instructgpt_hf.models.origins import is_adapter, origin, resolve_source
from instructgpt_hf.stages.run import StageRun

SLOW_TO_LOAD = 2**30  # bytes of weights


@dataclass(frozen=True)
class FinishedStage:
    """An earlier stage: its folder, its record, and what the recipe calls it."""

    folder: Path
    record: StageArtifact
    source: str
    revision: str | None

    @property
    def reference(self) -> dict[str, Any]:
        """Entry of a later stage's `previous` in stage.json."""
        found = {"source": self.source, "revision": self.revision, "path": source_place(self.folder)}
        return {**found, "fingerprint": self.record.fingerprint}


def previous_stage(
    run: StageRun, source: str | None, stage: str, revision: str | None = None, weights: bool = True
) -> FinishedStage:
    """An earlier stage of this run, or the one that a path or Hub id names, at a revision of a Hub id.

    `weights=False` downloads none.

    An SFT model may also be made elsewhere: its prompt format is the recipe's `prompt_template`, or by default its
    tokenizer's chat template.

    Raises:
        InstructGPTError: if it is missing or is another stage, or a model made elsewhere has no prompt format.
    """
    own = (run.run_folder / stage).absolute()
    folder = own if source is None else resolve_source(source, revision, f"{stage} stage", weights)
    if source is None and not (folder / STAGE_FILE).is_file():
        known = " to the folder or Hub id of a finished one" if stage == "sft" else ""
        raise InstructGPTError(
            f"{folder}: the {stage} stage has not been run here. Run it first, or set {stage}_model_path{known}."
        )
    if source is not None and stage == "sft" and _is_model(folder) and not (folder / STAGE_FILE).is_file():
        record = _made_elsewhere(folder, source, revision, run.settings.data_args.prompt_template)
        return FinishedStage(folder, record, source, revision)
    record = StageArtifact.load(folder)
    if record.stage != stage:
        raise InstructGPTError(f"{folder}: is a finished {record.stage!r} stage, expected {stage!r}.")
    return FinishedStage(folder, record, source or stage, revision)


def _is_model(folder: Path) -> bool:
    return is_adapter(folder) or (folder / "config.json").is_file()


def _made_elsewhere(folder: Path, source: str, revision: str | None, template: str | None) -> StageArtifact:
    """The record of an SFT model that this package did not train, which is its own base model."""
    tokenizer = load_tokenizer(folder)
    if template is None and not tokenizer.chat_template:
        raise InstructGPTError(
            f"sft_model_path: {source}: was made elsewhere (it has no {STAGE_FILE}), and its tokenizer has no chat "
            "template. Name the format that it was trained with as prompt_template: "
            f"{', '.join(sorted(PLAIN_TEMPLATES))}."
        )
    prompt_format = PromptFormat.create(template or "chat", tokenizer).to_dict()
    base = base_record(source, revision, folder, tokenizer)
    return StageArtifact("sft", "", {}, prompt_format, base, fingerprint=base["fingerprint"], seed=0)


def base_record(source: str, revision: str | None, folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Record of a pretrained model for stage.json: id, revision, fingerprints of weights and vocabulary, licence."""
    return {
        **origin(source, revision, folder),
        "fingerprint": model_fingerprint(folder),
        "vocabulary": vocabulary_fingerprint(tokenizer),
        **_license(folder),
    }


def _license(folder: Path) -> dict[str, str | None]:
    """The licence that a model's card states; `other` has a name and a link, and the link can be a file beside it."""
    card = folder / "README.md"
    stated = (metadata_load(card) or {}) if card.is_file() else {}
    return {key: value if isinstance(value := stated.get(key), str) else None for key in LICENSE_KEYS}


def model_record(model: torch.nn.Module, base: dict[str, Any]) -> dict[str, Any]:
    """Record of a trained model for stage.json: kind, architecture, licence, numbers of parameters."""
    return {
        "kind": "adapter" if hasattr(model, "peft_config") else "full",
        "architecture": type(unwrap_peft(model)).__name__,
        **{key: base.get(key) for key in LICENSE_KEYS},
        **count_parameters(model),
    }


def check_vocabulary(expected: dict[str, Any], other: dict[str, Any], role: str) -> None:
    """Raise unless the SFT model's base (`expected`) and the base of another `role` read the same token ids.

    Raises:
        InstructGPTError: naming both base models.
    """
    if expected["vocabulary"] != other["vocabulary"]:
        raise InstructGPTError(
            f"{role} comes from base model {other['id']!r}, whose tokenizer differs from that of {expected['id']!r}, "
            "the base of the SFT model: it would read the policy's token ids as other words. Choose models of one "
            "tokenizer."
        )


def recorded_format(
    sft: StageArtifact, name: str | None, tokenizer: PreTrainedTokenizerBase, where: str
) -> PromptFormat:
    """The SFT stage's prompt format, which a later stage may repeat but not change.

    Raises:
        InstructGPTError: if the later stage's recipe or tokenizer renders prompts differently.
    """
    recorded = PromptFormat.from_dict(sft.prompt_format)
    if name is not None:
        recorded.check_same(PromptFormat.create(name, tokenizer), where)
    return recorded


def model_options(settings: StageSettings) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` from a stage's settings."""
    config = settings.model_args
    dtype = config.dtype if config.dtype in (None, "auto") else getattr(torch, str(config.dtype))
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": config.attn_implementation}
    quantization = quantization_config(config)
    if quantization is not None:
        options["quantization_config"] = quantization
        options["device_map"] = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    if settings.training_args.trust_remote_code:
        options["trust_remote_code"] = True
    return {key: value for key, value in options.items() if value is not None}


def show_loading_progress(folder: Path) -> None:
    """Let transformers draw its bars for weights that take a while to read, and only for those."""
    size = sum(item.stat().st_size for item in folder.rglob("*.safetensors"))
    (logging.enable_progress_bar if size > SLOW_TO_LOAD else logging.disable_progress_bar)()


def usable_length(run: StageRun, config: PreTrainedConfig, max_length: int | None) -> int | None:
    """`max_length` in tokens, or the model's number of positions where that is smaller, which is logged."""
    limit = positions(config)
    if limit is None or (max_length is not None and max_length <= limit):
        return max_length
    run.log(f"max_length = {max_length}: the model has {limit} positions; longer examples are left out")
    return limit


def check_rollout_lengths(
    readers: Iterable[tuple[str, Path]], prompt: int, completion: int, ptx_length: int | None
) -> None:
    """Raise unless every model can read the longest prompt with the longest completion.

    A model with learned positions fails on a longer sequence, and others were not trained on it.

    Args:
        readers: role and folder of each model that reads the sampled token ids, the policy first.
        prompt: tokens of the longest prompt.
        completion: `max_completion_length`.
        ptx_length: `ptx_max_length`, which the policy reads; None without a pretraining gradient.

    Raises:
        InstructGPTError: naming the models with fewer positions, and the longest completion that fits.
    """
    problems = Problems("ppo.yaml: sequences are longer than a model reads:")
    for number, (role, folder) in enumerate(readers):
        limit = positions(load_config(folder))
        if limit is None:
            continue
        total = prompt + completion
        if total > limit:
            shorter = f"set max_completion_length to at most {limit - prompt}, or " if limit > prompt else ""
            problems.add(
                f"max_completion_length = {completion}: with the longest prompt ({prompt} tokens) {total}, and "
                f"the {role} ({folder}) has {limit} positions; {shorter}lower max_prompt_length"
            )
        if number == 0 and ptx_length is not None and ptx_length > limit:
            problems.add(f"ptx_max_length = {ptx_length}: the policy ({folder}) has {limit} positions")
    problems.raise_if_any()
