"""Training settings of the PPO stage."""

# ruff: noqa: RUF009  `setting` and `changed` return a dataclass field.
# mypy: disable-error-code="attr-defined, name-defined, has-type, misc"
# TRL exports its names lazily, which mypy does not see.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import trl
from transformers.trainer_utils import SchedulerType

from instructgpt_hf._compat.quirks import whole_batch_group
from instructgpt_hf.config.data import LONG_PROMPTS
from instructgpt_hf.config.device import world_size
from instructgpt_hf.config.fields import Upstream, changed, not_in_recipes, refused, setting
from instructgpt_hf.config.ranges import (
    AT_LEAST_ONE,
    AT_LEAST_TWO,
    FRACTION,
    NOT_NEGATIVE,
    ONE,
    POSITIVE,
    POSITIVE_SHARE,
    UNIT,
)
from instructgpt_hf.config.rules import SAMPLING, steps_per_iteration
from instructgpt_hf.config.training import StageConfig

_REDUCTIONS = ("token_mean", "sequence_sum")
_NOT_STATED = "ours: the paper does not state it"
_NONE_STATED = "ours: the paper does not state one"
_MINIBATCH = "C.4: minibatch of 64 episodes"
_EVALUATED = not_in_recipes("has no effect; the policies are evaluated when they are trained")
_ONE = not_in_recipes("is always 1, because the baseline of PPO is the value model; remove it")
_SFT_START = not_in_recipes("cannot be set: the policy starts from the SFT stage; set sft_model_path")
_REFERENCE = refused("has no effect; the KL reference is the SFT model (§3.5)")
_SCHEDULE = refused("is fixed: constant after warmup_iterations (C.4)")
_WHOLE = "would sample from another distribution than the log-probabilities are taken from; remove it"

_rloo = partial(changed, trl.RLOOConfig)


@dataclass
class PPOConfig(StageConfig, trl.RLOOConfig):
    """TRL's `RLOOConfig` with the paper's PPO and PPO-ptx (§3.5, C.4).

    One iteration samples `generation_batch_size` episodes and takes `optimizer_steps_per_iteration` optimizer steps on
    minibatches of `per_device_train_batch_size x gradient_accumulation_steps x processes` episodes. `epsilon` clips
    the ratio of every token, not of the sequence as RLOO does. `num_generations` is always 1: PPO's baseline is the
    value model, so a prompt needs no second completion.

    Raises:
        InstructGPTError: if settings are out of range or the batch sizes do not divide; lists all problems.
    """

    stage: ClassVar[str] = "ppo"
    upstream: ClassVar[Mapping[str, Upstream]] = {
        "epsilon_high": Upstream(POSITIVE),
        "max_grad_norm": Upstream(NOT_NEGATIVE, adjustable=True),
        "reward_clip_range": Upstream(adjustable=True),
        **dict.fromkeys(("log_completions", "log_unique_prompts", "num_completions_to_print"), Upstream(neutral=True)),
        # What RLOO samples and computes differently.
        **{key: refused(_WHOLE, *SAMPLING[key]) for key in ("min_p", "repetition_penalty", "top_k", "top_p")},
        **dict.fromkeys(("ref_model_mixup_alpha", "ref_model_sync_steps", "sync_ref_model"), _REFERENCE),
        **dict.fromkeys(("num_generations", "num_generations_eval"), _ONE),
        "chat_template_kwargs": refused("has no effect; the SFT stage's prompt format is used"),
        "log_multimodal": refused("has no effect; prompts are text"),
        "mask_truncated_completions": refused("has no effect; see missing_eos_penalty and missing_eos_score"),
        "normalize_advantages": refused("belongs to RLOO; set whiten_advantages"),
        "router_aux_loss_coef": refused("has no effect"),
        "steps_per_generation": not_in_recipes("follows from the batch sizes; set generation_batch_size"),
        # What the Trainer computes differently.
        **dict.fromkeys(("eval_on_start", "eval_steps", "eval_strategy"), _EVALUATED),
        **dict.fromkeys(("lr_scheduler_kwargs", "lr_scheduler_type"), _SCHEDULE),
        "data_seed": refused("has no effect; the order of the prompts follows seed"),
        "label_smoothing_factor": refused("has no effect; the losses are those of PPO and of next tokens"),
        "neftune_noise_alpha": refused("would add noise to the log-probabilities; remove it"),
        "num_train_epochs": refused("does not set the length of PPO; set total_episodes or max_steps"),
        "warmup_steps": refused("is counted in iterations; set warmup_iterations"),
        # Fields of `ModelConfig` that this stage does not read.
        **dict.fromkeys(("model_name_or_path", "model_revision"), _SFT_START),
    }

    # Objective: rewards, returns and advantages
    gamma: float = setting(1.0, "Discount per token.", "C.4: no discount", UNIT)
    lam: float = setting(0.95, "Lambda of generalised advantage estimation.", "ours: Stiennon et al. 2020, B.1", UNIT)
    whiten_advantages: bool = setting(True, "Give advantages mean 0 and variance 1.", "ours: Ziegler et al. 2019")
    whiten_rewards: bool = setting(False, "Divide rewards by their standard deviation.", "ours: only the bias (§3.5)")
    missing_eos_penalty: float | None = setting(
        None, "Subtracted from the score of a completion without EOS.", _NONE_STATED, NOT_NEGATIVE, adjustable=True
    )
    missing_eos_score: float | None = setting(
        None, "Score of completions without EOS.", f"{_NONE_STATED}; Huang et al. 2024 use -1", adjustable=True
    )

    # Policy loss
    epsilon: float = _rloo("epsilon", 0.2, "C.4", POSITIVE, adjustable=True)
    policy_loss_reduction: str = setting(
        "sequence_sum", "Sum over a completion (equation 2), or mean over tokens.", _NOT_STATED, choices=_REDUCTIONS
    )
    num_iterations: int = _rloo("num_iterations", 1, "C.4: one inner epoch", AT_LEAST_ONE)
    disable_dropout: bool = _rloo(
        "disable_dropout", True, "ours: log-probabilities must not depend on the forward pass"
    )

    # Value model
    cliprange_value: float = setting(
        0.2, "How far a value may move from the rollout's.", "ours: Ziegler 2019", POSITIVE, adjustable=True
    )
    vf_coef: float = setting(0.1, "Value loss weight.", "ours: Ziegler et al. 2019", NOT_NEGATIVE, adjustable=True)
    # The policy's learning rate is 0 in these iterations, and its warm-up starts after them.
    value_warmup_iterations: int = setting(
        0, "First iterations, which train the value model alone.", "ours: the paper states none", NOT_NEGATIVE
    )

    # KL penalty
    beta: float = _rloo("beta", 0.02, "C.4", NOT_NEGATIVE, adjustable=True)
    kl_estimator: str = setting(
        "k1", "KL in the reward: 'k1' (log ratio, equation 2) or 'k3' (non-negative).", "§3.5", choices=("k1", "k3")
    )
    kl_target: float | None = setting(
        None,
        "KL to the reference, in nats per completion, to which beta is adapted after each iteration.",
        "ours: the paper's beta is fixed; Ziegler et al. 2019 hold 6",
        POSITIVE,
        adjustable=True,
    )
    kl_horizon: float = setting(
        10_000, "Episodes in which beta changes by a fifth at most.", "ours: Ziegler 2019", POSITIVE, adjustable=True
    )

    # Pretraining gradient (PPO-ptx)
    ptx_coef: float = setting(
        27.8, "Weight of the pretraining loss (gamma of equation 2).", "C.4", NOT_NEGATIVE, adjustable=True
    )
    ptx_loss_reduction: str = setting(
        "token_mean", "Mean over tokens, or sum over an example.", _NOT_STATED, choices=_REDUCTIONS
    )
    ptx_episodes_ratio: int = setting(8, "Pretraining examples per episode.", "C.4", AT_LEAST_ONE)
    ptx_max_length: int = setting(1024, "Tokens per pretraining example.", _NOT_STATED, AT_LEAST_ONE)
    compare_without_ptx: bool = setting(False, "Also train with ptx_coef 0, into `ppo/`.", "ours", neutral=True)

    # Rollouts and batches
    total_episodes: int | None = setting(256_000, "Episodes; max_steps replaces it.", "C.4: 256k", AT_LEAST_ONE)
    generation_batch_size: int = _rloo("generation_batch_size", 512, "C.4", AT_LEAST_TWO)
    per_device_train_batch_size: int = _rloo("per_device_train_batch_size", 8, _MINIBATCH)
    gradient_accumulation_steps: int = _rloo("gradient_accumulation_steps", 8, _MINIBATCH)
    num_generations: int = _rloo("num_generations", 1, "C.4: one completion per prompt", ONE)
    # Continuous batching and vLLM bound the memory of their key-value caches themselves.
    rollout_batch_size: int | None = setting(
        None, "Completions a process generates at once.", "ours: all at once is fastest where it fits", AT_LEAST_ONE
    )
    temperature: float = _rloo("temperature", 1.0, "C.4", POSITIVE)

    # Lengths
    max_prompt_length: int | None = setting(1024, "Longer prompts are left out.", LONG_PROMPTS, AT_LEAST_ONE)
    min_completion_length: int = setting(0, "Tokens before EOS may come.", "ours: none is stated", NOT_NEGATIVE)
    max_completion_length: int = _rloo("max_completion_length", 1024, "App C: at most 1k tokens", AT_LEAST_ONE)

    # Learning rates
    learning_rate: float = _rloo(
        "learning_rate",
        5e-6,
        "ours: not stated; E.9 scans 2.55e-6 to 2.55e-5, plain PPO diverges early",
        adjustable=True,
    )
    value_learning_rate: float = setting(
        9e-6, "Learning rate of the value model.", "C.4: 5e-6 with a 175B policy", POSITIVE, adjustable=True
    )
    lr_scheduler_type: SchedulerType | str = _rloo("lr_scheduler_type", "constant", "C.4: constant after warm-up")
    warmup_iterations: int = setting(
        10, "Iterations in which the learning rates rise linearly.", "C.4", NOT_NEGATIVE, adjustable=True
    )
    warmup_start_factor: float = setting(0.1, "Share of the peak where the warm-up starts.", "C.4", POSITIVE_SHARE)

    # Weight average
    ema_decay: float = setting(0.992, "Decay of the average of the policy's weights; 0 keeps none.", "C.4", FRACTION)
    publish_weights: str = setting(
        "raw",
        "Weights in the stage's folder: 'raw' (the last) or 'ema' (their moving average).",
        "ours: the paper does not state which it evaluates",
        choices=("raw", "ema"),
    )

    # Guards, logging and saving
    stop_kl: float | None = setting(
        None, "Stop above this objective/kl (nats per completion).", "ours: unset only warns", POSITIVE, neutral=True
    )
    rollout_log_samples: int = setting(4, "Rollouts per iteration kept in rollouts.jsonl.", "ours", NOT_NEGATIVE)
    logging_steps: float | None = _rloo("logging_steps", None, "ours: one record per iteration")
    save_steps: float | None = _rloo("save_steps", None, "ours: every 10 iterations")
    save_total_limit: int | None = _rloo(
        "save_total_limit", 2, "ours: the newest may be of a policy that turns out to be broken"
    )

    @property
    def minibatch_size(self) -> int:
        """Episodes per optimizer step, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * world_size()

    @property
    def optimizer_steps_per_iteration(self) -> int:
        """Optimizer steps taken on one batch of rollouts."""
        return steps_per_iteration(self.generation_batch_size, self.minibatch_size, self.num_iterations)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_generations = 1

    def settle(self) -> None:
        """Set the lengths, which are multiples of an iteration, and satisfy the checks of RLOOConfig."""
        super().settle()
        steps = self.optimizer_steps_per_iteration
        if self.max_steps <= 0 and self.total_episodes is not None:
            self.max_steps = self.total_episodes // self.generation_batch_size * steps
        self.logging_steps = steps if self.logging_steps is None else self.logging_steps
        self.save_steps = 10 * steps if self.save_steps is None else self.save_steps
        # RLOOConfig takes one of the two. After construction both are set, so a copy of this config passes both.
        micro_batch = self.per_device_train_batch_size * world_size()
        if self.steps_per_generation == self.generation_batch_size // micro_batch:
            self.steps_per_generation = None
        whole_batch_group(self)
