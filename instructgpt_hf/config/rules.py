"""The ranges of the settings, and the rules that tie several settings together. Standard library only.

The dataclasses apply these rules when they are constructed, and the recipe loader applies the same rules to all of a
recipe's files before it constructs anything, so that it can report every problem at once.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

from instructgpt_hf.config.device import world_size


class Violation(NamedTuple):
    """One broken rule: the key to change, and what must hold. `keys` are all settings the rule reads."""

    key: str
    rule: str
    keys: tuple[str, ...]


class Range(NamedTuple):
    """The values one setting may take."""

    holds: Callable[[Any], bool]
    rule: str


_POSITIVE = Range(lambda value: value > 0, "must be greater than 0")
_NOT_NEGATIVE = Range(lambda value: value >= 0, "must be 0 or greater")
_AT_LEAST_ONE = Range(lambda value: value >= 1, "must be 1 or greater")
_FRACTION = Range(lambda value: 0 <= value < 1, "must be at least 0 and below 1")
_UNIT = Range(lambda value: 0 <= value <= 1, "must be between 0 and 1")
_LIMIT = Range(lambda value: value == -1 or value >= 1, "must be 1 or greater, or -1 for no limit")

RANGES: dict[str, Range] = {
    **dict.fromkeys(
        [
            "cliprange_value",
            "epsilon",
            "epsilon_high",
            "kl_horizon",
            "kl_target",
            "learning_rate",
            "logging_steps",
            "num_train_epochs",
            "save_steps",
            "stop_kl",
            "temperature",
            "value_learning_rate",
        ],
        _POSITIVE,
    ),
    **dict.fromkeys(
        [
            "adam_epsilon",
            "beta",
            "max_grad_norm",
            "min_completion_length",
            "missing_eos_penalty",
            "ptx_coef",
            "rollout_log_samples",
            "seed",
            "top_k",
            "value_warmup_iterations",
            "vf_coef",
            "warmup_iterations",
            "warmup_steps",
            "weight_decay",
        ],
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        [
            "eval_num_prompts",
            "gradient_accumulation_steps",
            "lora_alpha",
            "lora_r",
            "max_completion_length",
            "max_length",
            "max_prompt_length",
            "max_tokens_per_forward",
            "num_iterations",
            "per_device_eval_batch_size",
            "per_device_train_batch_size",
            "ptx_episodes_ratio",
            "ptx_max_length",
            "rollout_batch_size",
            "save_total_limit",
            "total_episodes",
        ],
        _AT_LEAST_ONE,
    ),
    **dict.fromkeys(
        ["adam_beta1", "adam_beta2", "ema_decay", "lora_dropout", "pretraining_mix", "residual_dropout"], _FRACTION
    ),
    **dict.fromkeys(["gamma", "lam"], _UNIT),
    "generation_batch_size": Range(lambda value: value >= 2, "must be 2 or greater"),
    "max_steps": _LIMIT,
    "top_p": Range(lambda value: 0 < value <= 1, "must be greater than 0 and at most 1"),
    "warmup_start_factor": Range(lambda value: 0 < value <= 1, "must be greater than 0 and at most 1"),
}


def range_violation(key: str, value: Any) -> str | None:
    """The rule that `value` breaks as a value of `key`, or None. A value of None (not set) breaks no range."""
    if value is None:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    known = RANGES.get(key)
    return known.rule if known and not known.holds(value) else None


def violations(stage: str, values: Mapping[str, Any]) -> list[Violation]:
    """The broken rules of one stage that involve more than one setting.

    Args:
        stage: `"sft"`, `"reward"` or `"ppo"`.
        values: every setting of the stage that is known, of the right type; rules with a setting that is not in it
            are skipped.
    """
    rules = [*_MODEL_RULES, *_STAGE_RULES[stage]]
    return [
        Violation(keys[0], problem, keys)
        for keys, rule in rules
        if all(key in values for key in keys) and (problem := rule(*(values[key] for key in keys))) is not None
    ]


def steps_per_iteration(generation_batch_size: int, minibatch: int, num_iterations: int) -> int:
    """Optimizer steps taken on one batch of rollouts."""
    return generation_batch_size // minibatch * num_iterations


# A rule reads the named settings, the one to blame first, and returns what must hold, or None if it does.
_Rule = tuple[tuple[str, ...], Callable[..., "str | None"]]


def _one_quantization(load_in_8bit: bool, load_in_4bit: bool) -> str | None:
    return "cannot be combined with load_in_4bit: choose one" if load_in_8bit and load_in_4bit else None


def _quantized_needs_adapter(use_peft: bool, load_in_4bit: bool, load_in_8bit: bool) -> str | None:
    if (load_in_4bit or load_in_8bit) and not use_peft:
        return "must be true with load_in_4bit or load_in_8bit: quantised weights are frozen, only adapters train"
    return None


# Where metrics can go, and the packages one of which it needs; transformers knows more of them.
_TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}


def _trackers_are_installed(report_to: str | list[str] | None) -> str | None:
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        packages = _TRACKERS.get(name, ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            return f"needs the package {packages[0]}: pip install {packages[0]}"
    return None


def _mix_needs_text(pretraining_dataset_name: str | None, pretraining_mix: float) -> str | None:
    if pretraining_mix > 0 and not pretraining_dataset_name:
        return f"must be set when pretraining_mix is above 0 (it is {pretraining_mix})"
    return None


def _ptx_needs_text(pretraining_dataset_name: str | None, ptx_coef: float) -> str | None:
    if ptx_coef > 0 and not pretraining_dataset_name:
        return f"must be set when ptx_coef is above 0 (it is {ptx_coef}); ptx_coef: 0 is plain PPO"
    return None


def _comparison_needs_ptx(compare_without_ptx: bool, ptx_coef: float) -> str | None:
    if compare_without_ptx and ptx_coef == 0:
        return "compares PPO-ptx with plain PPO and needs ptx_coef above 0"
    return None


def _one_correction(missing_eos_score: float | None, missing_eos_penalty: float | None) -> str | None:
    if missing_eos_score is not None and missing_eos_penalty is not None:
        return "cannot be combined with missing_eos_penalty: one replaces the score, the other is subtracted from it"
    return None


def _one_weight_per_reward(
    weights: list[float] | None, models: list[str] | None, functions: list[str] | None
) -> str | None:
    rewards = 1 + len(models or ()) + len(functions or ())
    if weights is None or len(weights) == rewards > 1:
        return None
    if rewards == 1:
        return "has no meaning with one reward; remove it, or set reward_functions or extra_reward_model_paths"
    return (
        f"must have {rewards} values: for the reward model, for each of extra_reward_model_paths, and for each of "
        "reward_functions, in this order"
    )


def _shortest_fits(shortest: int, longest: int, continuous: bool) -> str | None:
    if shortest > longest:
        return f"must be at most max_completion_length ({longest})"
    if shortest and continuous:
        return "must be 0 with use_transformers_continuous_batching, which ignores it"
    return None


def _vllm_installed(use_vllm: bool) -> str | None:
    if use_vllm and find_spec("vllm") is None:
        return "needs the package vllm, which is not installed: pip install 'trl[vllm]'"
    return None


def _vllm_whole_weights(use_vllm: bool, load_in_4bit: bool, load_in_8bit: bool) -> str | None:
    if use_vllm and (load_in_4bit or load_in_8bit):
        return "cannot be combined with load_in_4bit or load_in_8bit: vLLM is sent whole weights"
    return None


def _one_backend(continuous: bool, use_vllm: bool) -> str | None:
    return "cannot be combined with use_vllm: choose one" if continuous and use_vllm else None


def _minibatch_divides(generation: int, per_device: int, accumulation: int) -> str | None:
    processes = world_size()
    minibatch = per_device * accumulation * processes
    if generation % minibatch == 0:
        return None
    return (
        f"must be a multiple of the minibatch of {minibatch} episodes: per_device_train_batch_size {per_device} "
        f"x gradient_accumulation_steps {accumulation} x {processes} process{'es' if processes > 1 else ''}"
    )


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


def _steps_fill_iterations(max_steps: int, *sizes: int) -> str | None:
    steps = _iteration_steps(*sizes)
    if max_steps <= 0 or steps is None or max_steps % steps == 0:
        return None
    return f"must be a multiple of the {steps} optimizer steps of one iteration, or its last rollouts go to waste"


def _saves_after_iterations(save_steps: float | None, strategy: Any, *sizes: int) -> str | None:
    steps = _iteration_steps(*sizes)
    if save_steps is None or str(getattr(strategy, "value", strategy)) != "steps" or steps is None:
        return None
    if save_steps % steps == 0:
        return None
    return (
        f"must be a multiple of the {steps} optimizer steps of one iteration: rollouts are not saved, so only the end "
        "of an iteration can be resumed exactly"
    )


# Settings of `generate` and of vLLM that change from which distribution tokens are drawn.
_CHANGE_SAMPLING = {
    *("bad_words", "bad_words_ids", "begin_suppress_tokens", "do_sample", "epsilon_cutoff", "eta_cutoff"),
    *("exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "frequency_penalty"),
    *("guidance_scale", "logit_bias", "min_length", "min_new_tokens", "min_p", "min_tokens", "no_repeat_ngram_size"),
    *("num_beams", "presence_penalty", "repetition_penalty", "sequence_bias", "suppress_tokens", "temperature"),
    *("top_h", "top_k", "top_p", "typical_p", "watermarking_config"),
}
_STAND_FOR = {"temperature": "temperature", **dict.fromkeys(("min_new_tokens", "min_tokens"), "min_completion_length")}


# Values of such settings that change nothing, by which scripts switch them off.
CHANGE_NOTHING: dict[str, tuple[Any, ...]] = {
    "do_sample": (True,),
    "min_p": (0.0,),
    "num_beams": (1,),
    "repetition_penalty": (1.0,),
    "top_k": (0,),
    "top_p": (1.0,),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "no_repeat_ngram_size"), (0.0,)),
}


def _whole_distribution(generation_kwargs: Mapping[str, Any] | None) -> str | None:
    given = generation_kwargs or {}
    for key in sorted(_CHANGE_SAMPLING & set(given)):
        if given[key] is None or given[key] in CHANGE_NOTHING.get(key, ()):
            continue
        instead = f"set {_STAND_FOR[key]}" if key in _STAND_FOR else "remove it"
        return f"{key} would sample from another distribution than the log-probabilities are taken from; {instead}"
    return None


def _target_needs_penalty(kl_target: float | None, beta: float) -> str | None:
    return "adapts beta, which must be above 0" if kl_target is not None and beta == 0 else None


def _target_below_stop(kl_target: float | None, stop_kl: float | None) -> str | None:
    if kl_target is not None and stop_kl is not None and kl_target >= stop_kl:
        return f"must be below stop_kl ({stop_kl:g})"
    return None


def _horizon_holds_batches(kl_horizon: float, generation: int, kl_target: float | None) -> str | None:
    if kl_target is not None and kl_horizon < generation:
        return f"must be at least generation_batch_size ({generation}): beta changes once for each batch"
    return None


def _value_warmup_ends(warmup: int, total: int | None, max_steps: int, generation: int, *batch: int) -> str | None:
    steps = _iteration_steps(generation, *batch)
    iterations = max_steps // steps if max_steps > 0 and steps else (total or 0) // generation
    if warmup and warmup >= iterations:
        return f"must be below the {iterations} iterations of the stage: the policy would never be trained"
    return None


def _stream_needs_steps(max_steps: int, streaming: bool) -> str | None:
    return "must be set with streaming: the length of a stream is not known" if streaming and max_steps < 1 else None


def _stream_needs_one_reader(dataloader_num_workers: int, streaming: bool) -> str | None:
    if streaming and dataloader_num_workers:
        return "must be 0 with streaming: what worker processes leave out could not be counted"
    return None


_MODEL_RULES: list[_Rule] = [
    (("load_in_8bit", "load_in_4bit"), _one_quantization),
    (("use_peft", "load_in_4bit", "load_in_8bit"), _quantized_needs_adapter),
    (("report_to",), _trackers_are_installed),
]
_BATCH = ("generation_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")
_STAGE_RULES: dict[str, list[_Rule]] = {
    "sft": [(("pretraining_dataset_name", "pretraining_mix"), _mix_needs_text)],
    "reward": [
        (("max_steps", "streaming"), _stream_needs_steps),
        (("dataloader_num_workers", "streaming"), _stream_needs_one_reader),
    ],
    "ppo": [
        (("pretraining_dataset_name", "ptx_coef"), _ptx_needs_text),
        (("compare_without_ptx", "ptx_coef"), _comparison_needs_ptx),
        (("missing_eos_score", "missing_eos_penalty"), _one_correction),
        (("reward_weights", "extra_reward_model_paths", "reward_functions"), _one_weight_per_reward),
        (
            ("min_completion_length", "max_completion_length", "use_transformers_continuous_batching"),
            _shortest_fits,
        ),
        (("generation_kwargs",), _whole_distribution),
        (("use_vllm",), _vllm_installed),
        (("use_vllm", "load_in_4bit", "load_in_8bit"), _vllm_whole_weights),
        (("use_transformers_continuous_batching", "use_vllm"), _one_backend),
        (_BATCH, _minibatch_divides),
        (("total_episodes", "generation_batch_size", "max_steps"), _episodes_fill_iterations),
        (("max_steps", *_BATCH, "num_iterations"), _steps_fill_iterations),
        (("save_steps", "save_strategy", *_BATCH, "num_iterations"), _saves_after_iterations),
        (("kl_target", "beta"), _target_needs_penalty),
        (("kl_target", "stop_kl"), _target_below_stop),
        (("kl_horizon", "generation_batch_size", "kl_target"), _horizon_holds_batches),
        (("value_warmup_iterations", "total_episodes", "max_steps", *_BATCH, "num_iterations"), _value_warmup_ends),
    ],
}
