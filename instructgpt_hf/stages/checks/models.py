"""The models that a run starts from, by their configs and tokenizers: no weights are downloaded or read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from huggingface_hub import HfApi
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from instructgpt_hf.artifacts import vocabulary_fingerprint
from instructgpt_hf.config.model import peft_config
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.models.loading import (
    compare_adapter_settings,
    load_config,
    load_tokenizer,
    positions,
)
from instructgpt_hf.models.origins import adapter_source, adapter_values, base_model_folder, is_adapter
from instructgpt_hf.stages.checks.report import Report
from instructgpt_hf.stages.inputs import FinishedStage, check_vocabulary, previous_stage
from instructgpt_hf.stages.reward_sources import check_value_start, check_value_vocabulary
from instructgpt_hf.stages.run import StageRun

WEIGHTS = (".safetensors", ".bin")


class FoundModel(NamedTuple):
    """A model without its weights.

    Attributes:
        folder: of config and tokenizer.
        weights: bytes of its weight files; of an adapter, those of its base; 0 where they are not known.
        download: how many of these are not on this machine yet.
        adapter: whether it is an adapter.
    """

    folder: Path
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    weights: int
    download: int
    adapter: bool

    def described(self) -> str:
        """For the table: architecture and size."""
        size = f", {size_text(self.weights)}" if self.weights else ""
        return f"{self.config.model_type}{size}{' to download' if self.download else ''}"


class Policy(NamedTuple):
    """The SFT model of the run, finished or not: what later stages must fit to."""

    model: FoundModel
    base: str  # source of its base model
    prompt_format: PromptFormat | None  # None where it cannot be rendered, which is a problem of its own

    @property
    def base_record(self) -> dict[str, Any]:
        """What `check_vocabulary` compares."""
        return {"id": self.base, "vocabulary": vocabulary_fingerprint(self.model.tokenizer)}


def find_model(source: str, revision: str | None, role: str) -> FoundModel:
    """Look a model up by its small files; of an adapter, its base too.

    Raises:
        InstructGPTError: if it is not there, or lacks a config, a tokenizer or weights.
    """
    folder = base_model_folder(source, revision, role, weights=False)
    if is_adapter(folder):
        base = find_model(*adapter_source(folder), "base model of the adapter")
        return base._replace(folder=folder, tokenizer=load_tokenizer(folder), adapter=True)
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    weights, download = _weights(source, revision, folder)
    return FoundModel(folder, config, tokenizer, weights, download, adapter=False)


def _weights(source: str, revision: str | None, folder: Path) -> tuple[int, int]:
    """Bytes of the weights, and of those to download; 0 where the Hub does not tell."""
    here = sum(item.stat().st_size for item in folder.iterdir() if item.suffix in WEIGHTS)
    if here:
        return here, 0
    files: dict[str, int] = {}
    if folder != Path(source).expanduser():
        try:
            siblings = HfApi().model_info(source, revision=revision, files_metadata=True).siblings or []
        except Exception:  # the config could be read, so nothing is wrong that this call would tell
            return 0, 0
        files = {item.rfilename: item.size or 0 for item in siblings}
    sizes = [size for name, size in files.items() if name.endswith(".safetensors") and "/" not in name]
    if not sizes:
        others = ", ".join(sorted(name for name in files if name.endswith(WEIGHTS)))
        found = f"it has {others}, which is not read from the Hub" if others else "its folder has only other files"
        raise InstructGPTError(f"{source}: has no weights (model.safetensors): {found}.")
    return sum(sizes), sum(sizes)


def check_base(run: StageRun, report: Report) -> Policy | None:
    """The base model of the SFT stage, and the prompt format of the run."""
    data_args, model_args = run.settings.data_args, run.settings.model_args
    source = model_args.model_name_or_path
    model, prompt_format = None, None
    with report.setting("sft", "model_name_or_path", source):
        model = find_model(source, model_args.model_revision, "model_name_or_path")
        if not _is_known(model.config, MODEL_FOR_CAUSAL_LM_MAPPING):
            raise InstructGPTError(f"{source}: {model.config.model_type} is no causal language model.")
        report.found("sft", "base model", source, model.described())
    if model is None:
        return None
    with report.setting("sft", "prompt_template", data_args.prompt_template):
        prompt_format = PromptFormat.create(data_args.prompt_template, model.tokenizer)
    return Policy(model, source, prompt_format)


def check_previous_sft(run: StageRun, report: Report) -> Policy | None:
    """The finished SFT stage that a later one names, or that must be in the run's folder."""
    stage, source = run.settings.stage, run.settings.data_args.sft_model_path
    revision = run.settings.data_args.sft_model_revision
    with report.setting(stage, "sft_model_path", source):
        sft = previous_stage(run, source, "sft", revision, weights=False)
        model = find_model(source or str(sft.folder), revision, "sft stage")
        report.found(stage, "SFT model", source or sft.folder, model.described())
        return Policy(model, sft.record.base_model["id"], PromptFormat.from_dict(sft.record.prompt_format))
    return None


def check_reward_start(run: StageRun, policy: Policy | None, report: Report) -> None:
    """The model that becomes the reward model: the SFT model, or another one of its tokenizer."""
    model_args = run.settings.model_args
    source, model = model_args.model_name_or_path, policy.model if policy else None
    with report.setting("reward", "model_name_or_path", source):
        if source is not None:
            model = find_model(source, model_args.model_revision, "model_name_or_path")
            report.found("reward", "start", source, model.described())
            if policy is not None:
                check_vocabulary(policy.base_record, Policy(model, source, None).base_record, "the reward model")
        if model is not None and not _is_known(model.config, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING):
            raise InstructGPTError(
                f"{model.folder}: transformers has no sequence classifier for this architecture "
                f"({model.config.model_type}), so it cannot become a reward model."
            )


def check_rewards(run: StageRun, policy: Policy | None, part_of_run: bool, report: Report) -> None:
    """The reward models and the value model's start that PPO names, or that must be in the run's folder."""
    data_args = run.settings.data_args
    first, others = data_args.reward_model_path, data_args.extra_reward_model_paths or ()
    if first is not None or (run.settings.reward_stage and not part_of_run):
        with report.setting("ppo", "reward_model_path", first):
            reward = _find_reward(run, first, report, data_args.reward_model_revision)
            if policy is not None and policy.prompt_format is not None and data_args.value_model_path is None:
                check_value_start(reward, policy.base_record, policy.prompt_format)
    for source in others:
        with report.setting("ppo", "extra_reward_model_paths", source):
            _find_reward(run, source, report)
    if data_args.value_model_path is not None:
        with report.setting("ppo", "value_model_path", data_args.value_model_path):
            model = find_model(data_args.value_model_path, None, "value model")
            if policy is not None:
                check_value_vocabulary(data_args.value_model_path, model.tokenizer, policy.model.tokenizer)
            report.found("ppo", "value model", data_args.value_model_path, model.described())


def check_adapters(stages: Mapping[str, StageRun], base: FoundModel, report: Report) -> None:
    """LoRA settings of later stages against the adapters that the run's own earlier ones will leave."""
    first, reward, ppo = (stages.get(stage) for stage in ("sft", "reward", "ppo"))
    sft_adapter = adapter_values(base.folder) if base.adapter else _fresh_adapter(first)
    if sft_adapter is None:
        return
    starts = {"reward": reward} if _starts_from(reward, "sft_model_path") else {}
    # PPO goes on with two adapters; where the reward model's is another one, the stage itself compares them.
    if starts and _starts_from(ppo, "sft_model_path", "reward_model_path", "value_model_path"):
        starts["ppo"] = ppo
    for stage, run in starts.items():
        with report.setting(stage, "use_peft"):
            compare_adapter_settings([sft_adapter], run.settings.values, f"{stage}.yaml", "the SFT stage")


def _fresh_adapter(run: StageRun | None) -> dict[str, Any] | None:
    config = None if run is None else peft_config(run.settings.model_args, "CAUSAL_LM")
    return None if config is None else config.to_dict()


def _starts_from(run: StageRun | None, *paths: str) -> TypeGuard[StageRun]:
    """Whether a stage starts from what the run trains: none of the settings names another model."""
    return run is not None and not any(
        [run.settings.model_args.model_name_or_path, *(getattr(run.settings.data_args, path) for path in paths)]
    )


def check_positions(run: StageRun, policy: Policy | None, report: Report) -> None:
    """Whether a completion of the longest length fits into the policy's positions at all."""
    limit = positions(policy.model.config) if policy is not None else None
    longest = run.settings.training_args.max_completion_length
    with report.setting("ppo", "max_completion_length", longest):
        if limit is not None and longest >= limit:
            raise InstructGPTError(f"the policy has {limit} positions for prompt and completion.")


def _is_known(config: PreTrainedConfig, architectures: Any) -> bool:
    """Whether transformers has a class for a config; code that comes with a model is not looked at."""
    return type(config) in architectures or bool(getattr(config, "auto_map", None))


def size_text(size: int) -> str:
    """Bytes for people, as disks and downloads count them."""
    unit, name = next(((unit, name) for unit, name in ((10**9, "GB"), (10**6, "MB")) if size >= unit), (10**3, "kB"))
    return f"{size / unit:.3g} {name}"


def _find_reward(run: StageRun, source: str | None, report: Report, revision: str | None = None) -> FinishedStage:
    stage = previous_stage(run, source, "reward", revision, weights=False)
    model = find_model(source or str(stage.folder), revision, "reward stage")
    report.found("ppo", "reward model", source or stage.folder, model.described())
    return stage
