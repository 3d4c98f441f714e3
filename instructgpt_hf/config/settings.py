"""Temporary."""

from __future__ import annotations

NEUTRAL = {
    "compare_without_ptx",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "disable_tqdm",
    "eval_num_prompts",
    "log_completions",
    "log_unique_prompts",
    "num_completions_to_print",
    "project",
    "report_to",
    "resume_from_checkpoint",
    "run_name",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "stop_kl",
}
ADJUSTABLE = (
    "beta",
    "cliprange_value",
    "epsilon",
    "kl_horizon",
    "kl_target",
    "learning_rate",
    "max_grad_norm",
    "missing_eos_penalty",
    "missing_eos_score",
    "ptx_coef",
    "reward_clip_range",
    "value_learning_rate",
    "vf_coef",
    "warmup_iterations",
)


def matters(stage: str, key: str) -> bool:
    return key not in NEUTRAL and not key.startswith(("hub_", "push_to_hub", "logging_", "trackio_"))


def adjustable_keys(stage: str) -> tuple[str, ...]:
    return ADJUSTABLE if stage == "ppo" else ()
