"""Rules across settings, and rules about installed packages. Standard library only.

What one setting may be stands on its field. The training configs apply these rules when they are constructed; the
recipe loader before, to all files of a recipe, to report every problem at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

from instructgpt_hf.artifacts import STAGES
from instructgpt_hf.config.device import world_size

_Rule = Callable[..., "str | None"]
_RULES: dict[str, list[tuple[tuple[str, ...], _Rule]]] = {stage: [] for stage in STAGES}
_BATCH = ("generation_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")


class Violation(NamedTuple):
    """A broken rule: the key to change, what must hold, and all keys that the rule reads."""

    key: str
    rule: str
    keys: tuple[str, ...]


def violations(stage: str, values: Mapping[str, Any]) -> list[Violation]:
    """The rules of a stage that its settings break.

    Args:
        stage: `"sft"`, `"reward"` or `"ppo"`.
        values: settings of the right types; rules that read a setting which is not among them are skipped.
    """
    return [
        Violation(keys[0], problem, keys)
        for keys, rule in _RULES[stage]
        if all(key in values for key in keys) and (problem := rule(*(values[key] for key in keys))) is not None
    ]


def steps_per_iteration(generation_batch_size: int, minibatch: int, num_iterations: int) -> int:
    """Optimizer steps taken on one batch of rollouts."""
    return generation_batch_size // minibatch * num_iterations


def _reads(*keys: str, stages: tuple[str, ...] = ("ppo",)) -> Callable[[_Rule], _Rule]:
    """Register a rule: a function of the values of `keys` that returns what must hold, or None if it does.

    A broken rule is reported for the first key.
    """

    def register(rule: _Rule) -> _Rule:
        for stage in stages:
            _RULES[stage].append((keys, rule))
        return rule

    return register


@_reads("load_in_8bit", "load_in_4bit", stages=STAGES)
def _one_quantization(load_in_8bit: bool, load_in_4bit: bool) -> str | None:
    return "cannot be combined with load_in_4bit: choose one" if load_in_8bit and load_in_4bit else None


@_reads("use_peft", "load_in_4bit", "load_in_8bit", stages=STAGES)
def _quantized_needs_adapter(use_peft: bool, load_in_4bit: bool, load_in_8bit: bool) -> str | None:
    if (load_in_4bit or load_in_8bit) and not use_peft:
        return "must be true with load_in_4bit or load_in_8bit: quantised weights are frozen, only adapters train"
    return None


# Destinations of metrics, and the packages of which each needs one. transformers knows more destinations.
_TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}


@_reads("report_to", stages=STAGES)
def _trackers_are_installed(report_to: str | list[str] | None) -> str | None:
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        packages = _TRACKERS.get(name, ())
        if packages and not any(map(find_spec, packages)):
            return f"needs the package {packages[0]}: pip install {packages[0]}"
    return None


@_reads("save_strategy", "eval_strategy", "metric_for_best_model", stages=("sft", "reward"))
def _best_is_measured(save_strategy: Any, eval_strategy: Any, metric: str | None) -> str | None:
    if _named(save_strategy) == "best" and (_named(eval_strategy) == "no" or metric is None):
        return (
            "best saves no checkpoint without eval_strategy and metric_for_best_model: set both, or save_strategy to "
            "steps, epoch or no"
        )
    return None


@_reads("save_strategy")
def _nothing_is_best(save_strategy: Any) -> str | None:
    best = _named(save_strategy) == "best"
    return "best saves no checkpoint, for nothing is evaluated in training: set steps or no" if best else None


def _named(choice: Any) -> str:
    """A choice of transformers by its name in recipes."""
    return str(getattr(choice, "value", choice))


@_reads("pretraining_dataset_name", "pretraining_mix", stages=("sft",))
def _mix_needs_text(pretraining_dataset_name: str | None, pretraining_mix: float) -> str | None:
    missing = pretraining_mix > 0 and not pretraining_dataset_name
    return f"must be set when pretraining_mix is above 0 (it is {pretraining_mix})" if missing else None


@_reads("sft_model_revision", "sft_model_path", stages=("reward", "ppo"))
def _sft_revision_needs_hub_id(revision: str | None, path: str | None) -> str | None:
    return _revision_of("sft_model_path", revision, path)


@_reads("reward_model_revision", "reward_model_path")
def _reward_revision_needs_hub_id(revision: str | None, path: str | None) -> str | None:
    return _revision_of("reward_model_path", revision, path)


def _revision_of(key: str, revision: str | None, path: str | None) -> str | None:
    return f"has no effect without {key}, the Hub id that it belongs to" if revision and not path else None


@_reads("max_steps", "streaming", stages=("reward",))
def _stream_needs_steps(max_steps: int, streaming: bool) -> str | None:
    return "must be set with streaming: the length of a stream is not known" if streaming and max_steps < 1 else None


@_reads("dataloader_num_workers", "streaming", stages=("reward",))
def _stream_needs_one_reader(dataloader_num_workers: int, streaming: bool) -> str | None:
    if streaming and dataloader_num_workers:
        return "must be 0 with streaming: rows that worker processes leave out could not be counted"
    return None


@_reads("pretraining_dataset_name", "ptx_coef")
def _ptx_needs_text(pretraining_dataset_name: str | None, ptx_coef: float) -> str | None:
    if ptx_coef > 0 and not pretraining_dataset_name:
        return f"must be set when ptx_coef is above 0 (it is {ptx_coef}); ptx_coef: 0 is plain PPO"
    return None


@_reads("compare_without_ptx", "ptx_coef")
def _comparison_needs_ptx(compare_without_ptx: bool, ptx_coef: float) -> str | None:
    alike = compare_without_ptx and ptx_coef == 0
    return "compares PPO-ptx with plain PPO and needs ptx_coef above 0" if alike else None


@_reads("missing_eos_score", "missing_eos_penalty")
def _one_correction(missing_eos_score: float | None, missing_eos_penalty: float | None) -> str | None:
    if missing_eos_score is not None and missing_eos_penalty is not None:
        return "cannot be combined with missing_eos_penalty: one replaces the score, the other is subtracted from it"
    return None


@_reads("reward_weights", "extra_reward_model_paths", "reward_functions", "reward_model_path", "reward_stage")
def _one_weight_per_reward(
    weights: list[float] | None,
    models: list[str] | None,
    functions: list[str] | None,
    reward_model: str | None,
    reward_stage: bool,
) -> str | None:
    first = reward_stage or reward_model is not None
    rewards = first + len(models or ()) + len(functions or ())
    if weights is None or len(weights) == rewards > 1:
        return None
    if rewards == 1:
        return "has no meaning with one reward; remove it, or set reward_functions or extra_reward_model_paths"
    model = "for the reward model, " if first else ""
    return (
        f"must have {rewards} values: {model}for each of extra_reward_model_paths, and for each of "
        "reward_functions, in this order"
    )


@_reads("min_completion_length", "max_completion_length", "use_transformers_continuous_batching")
def _shortest_fits(shortest: int, longest: int, continuous: bool) -> str | None:
    if shortest > longest:
        return f"must be at most max_completion_length ({longest})"
    if shortest and continuous:
        return "must be 0 with use_transformers_continuous_batching, which ignores it"
    return None


# Options of `generate` and of vLLM that change the distribution from which tokens are drawn, each with the values that
# switch it off.
SAMPLING: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("do_sample", "num_beams", "repetition_penalty", "top_p"), (1.0,)),
    **dict.fromkeys(("frequency_penalty", "min_p", "no_repeat_ngram_size", "presence_penalty", "top_k"), (0.0,)),
    **dict.fromkeys(("bad_words", "bad_words_ids", "begin_suppress_tokens", "epsilon_cutoff", "eta_cutoff"), ()),
    **dict.fromkeys(("exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id"), ()),
    **dict.fromkeys(("guidance_scale", "logit_bias", "min_length", "min_new_tokens", "min_tokens"), ()),
    **dict.fromkeys(("sequence_bias", "suppress_tokens", "temperature", "top_h", "typical_p"), ()),
    "watermarking_config": (),
}
# The settings to use in place of such options.
_INSTEAD = {"temperature": "temperature", **dict.fromkeys(("min_new_tokens", "min_tokens"), "min_completion_length")}


@_reads("generation_kwargs")
def _whole_distribution(generation_kwargs: Mapping[str, Any] | None) -> str | None:
    given = generation_kwargs or {}
    for key in sorted(set(SAMPLING) & set(given)):
        if given[key] is not None and given[key] not in SAMPLING[key]:
            instead = f"set {_INSTEAD[key]}" if key in _INSTEAD else "remove it"
            return f"{key} would sample from another distribution than the log-probabilities are taken from; {instead}"
    return None


VLLM = "vllm>=0.29,<0.31"  # as in pyproject.toml's extra


@_reads("use_vllm")
def _vllm_installed(use_vllm: bool) -> str | None:
    missing = use_vllm and find_spec("vllm") is None
    return f"needs the package vllm, which is not installed: pip install '{VLLM}'" if missing else None


@_reads("use_vllm", "load_in_4bit", "load_in_8bit")
def _vllm_whole_weights(use_vllm: bool, load_in_4bit: bool, load_in_8bit: bool) -> str | None:
    if use_vllm and (load_in_4bit or load_in_8bit):
        return "cannot be combined with load_in_4bit or load_in_8bit: vLLM is sent whole weights"
    return None


@_reads("use_transformers_continuous_batching", "use_vllm")
def _one_backend(continuous: bool, use_vllm: bool) -> str | None:
    return "cannot be combined with use_vllm: choose one" if continuous and use_vllm else None


@_reads(*_BATCH)
def _minibatch_divides(generation: int, per_device: int, accumulation: int) -> str | None:
    processes = world_size()
    minibatch = per_device * accumulation * processes
    factors = f"per_device_train_batch_size {per_device} x gradient_accumulation_steps {accumulation}"
    factors += f" x {processes} process{'es' if processes > 1 else ''}"
    rule = f"must be a multiple of the minibatch of {minibatch} episodes: {factors}"
    return rule if generation % minibatch else None


@_reads("total_episodes", "generation_batch_size", "max_steps")
def _episodes_fill_iterations(total: int | None, generation: int, max_steps: int) -> str | None:
    if max_steps > 0:
        return None
    if total is None:
        return "must be set unless max_steps is"
    if total % generation:
        return f"must be a multiple of generation_batch_size ({generation}): every iteration is a full batch"
    return None


def _iteration_steps(generation: int, per_device: int, accumulation: int, inner: int) -> int | None:
    """Optimizer steps of one iteration; None if minibatches do not divide it, which another rule reports."""
    minibatch = per_device * accumulation * world_size()
    return None if generation % minibatch else steps_per_iteration(generation, minibatch, inner)


@_reads("max_steps", *_BATCH, "num_iterations")
def _steps_fill_iterations(max_steps: int, *sizes: int) -> str | None:
    steps = _iteration_steps(*sizes)
    if max_steps <= 0 or steps is None or max_steps % steps == 0:
        return None
    return f"must be a multiple of the {steps} optimizer steps of one iteration, or its last rollouts go to waste"


@_reads("save_steps", "save_strategy", *_BATCH, "num_iterations")
def _saves_after_iterations(save_steps: float | None, strategy: Any, *sizes: int) -> str | None:
    steps = _iteration_steps(*sizes)
    if save_steps is None or _named(strategy) != "steps" or steps is None or save_steps % steps == 0:
        return None
    return f"must be a multiple of the {steps} optimizer steps of one iteration: only its end can be resumed exactly"


@_reads("kl_target", "beta")
def _target_needs_penalty(kl_target: float | None, beta: float) -> str | None:
    return "adapts beta, which must be above 0" if kl_target is not None and beta == 0 else None


@_reads("kl_target", "stop_kl")
def _target_below_stop(kl_target: float | None, stop_kl: float | None) -> str | None:
    above = kl_target is not None and stop_kl is not None and kl_target >= stop_kl
    return f"must be below stop_kl ({stop_kl:g})" if above else None


@_reads("kl_horizon", "generation_batch_size", "kl_target")
def _horizon_holds_batches(kl_horizon: float, generation: int, kl_target: float | None) -> str | None:
    if kl_target is not None and kl_horizon < generation:
        return f"must be at least generation_batch_size ({generation}): beta changes once for each batch"
    return None


@_reads("value_warmup_iterations", "total_episodes", "max_steps", *_BATCH, "num_iterations")
def _value_warmup_ends(warmup: int, total: int | None, max_steps: int, generation: int, *batch: int) -> str | None:
    steps = _iteration_steps(generation, *batch)
    iterations = max_steps // steps if max_steps > 0 and steps else (total or 0) // generation
    if warmup and warmup >= iterations:
        return f"must be below the {iterations} iterations of the stage: the policy would never be trained"
    return None
