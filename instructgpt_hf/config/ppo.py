"""Training settings of the PPO stage."""

# ruff: noqa: RUF009  `changed` returns a dataclass field.
# mypy: disable-error-code="attr-defined, name-defined, has-type, misc"
# TRL exports its names lazily, which mypy does not see.

from __future__ import annotations

from dataclasses import dataclass

import trl
from transformers.trainer_utils import SchedulerType

from instructgpt_hf.config.device import world_size
from instructgpt_hf.config.fields import changed, setting
from instructgpt_hf.config.rules import steps_per_iteration
from instructgpt_hf.config.training import _BETA2, _CHECKPOINTING, _PRECISION, _before_upstream, _check

_REDUCTION = "ours: the paper does not state it"


@dataclass
class PPOConfig(trl.RLOOConfig):
    """TRL's `RLOOConfig` with the paper's PPO and PPO-ptx (§3.5, C.4).

    One iteration samples `generation_batch_size` episodes and takes `optimizer_steps_per_iteration` optimizer steps on
    minibatches of `per_device_train_batch_size x gradient_accumulation_steps x processes` episodes. `epsilon` clips
    the ratio of every token, not of the sequence as RLOO does. `num_generations` is always 1: PPO's baseline is the
    value model, so a prompt needs no second completion.

    Raises:
        InstructGPTError: if settings are out of range or the batch sizes do not divide; lists all of them.
    """

    gamma: float = setting(1.0, "Discount per token.", "C.4: no discount")
    lam: float = setting(0.95, "Lambda of generalised advantage estimation.", "ours: Stiennon et al. 2020, B.1")
    cliprange_value: float = setting(
        0.2, "How far a token's value may move from the rollout's before its loss is clipped.", "ours: Ziegler 2019"
    )
    vf_coef: float = setting(0.1, "Weight of the value loss.", "ours: Ziegler et al. 2019")
    value_learning_rate: float = setting(9e-6, "Learning rate of the value model.", "C.4: 5e-6 with a 175B policy")
    policy_loss_reduction: str = setting(
        "sequence_sum",
        "How a minibatch's token losses become the policy loss: 'token_mean', or 'sequence_sum' (summed over an "
        "answer, averaged over answers: equation 2 as written).",
        _REDUCTION,
        ["token_mean", "sequence_sum"],
    )
    ptx_loss_reduction: str = setting(
        "token_mean",
        "The same for the pretraining loss: 'token_mean', or 'sequence_sum' (summed over an example of ptx_max_length "
        "tokens, averaged over examples).",
        _REDUCTION,
        ["token_mean", "sequence_sum"],
    )
    ptx_coef: float = setting(
        27.8,
        "Weight of the pretraining loss (gamma of equation 2); 0 is plain PPO. What a value amounts to depends on the "
        "two reductions.",
        "C.4",
    )
    ptx_episodes_ratio: int = setting(8, "Pretraining examples per episode.", "C.4")
    ptx_max_length: int = setting(1024, "Tokens per pretraining example.", "ours: the paper does not state it")
    warmup_iterations: int = setting(10, "Iterations in which the learning rates rise linearly to their peak.", "C.4")
    warmup_start_factor: float = setting(0.1, "Fraction of the peak at which the warm-up starts.", "C.4")
    value_warmup_iterations: int = setting(
        0,
        "First iterations that train the value model alone. The policy's learning rate is 0 in them, and its warm-up "
        "starts after them.",
        "ours: the paper states none",
    )
    ema_decay: float = setting(0.992, "Decay of the moving average of the policy's weights; 0 keeps none.", "C.4")
    publish_weights: str = setting(
        "raw",
        "Which weights the stage's folder holds: 'raw' (the last) or 'ema' (the moving average).",
        "ours: the paper does not state which it evaluates",
        ["raw", "ema"],
    )
    min_completion_length: int = setting(
        0, "Tokens of an answer before EOS may come; log-probabilities are those without it.", "ours: none is stated"
    )
    missing_eos_penalty: float | None = setting(
        None, "Subtracted from the score of an answer without end-of-text.", "ours: the paper does not state one"
    )
    missing_eos_score: float | None = setting(
        None,
        "Score of an answer without end-of-text, in place of its own; not together with missing_eos_penalty.",
        "ours: the paper does not state one; Huang et al. 2024 use -1",
    )
    whiten_advantages: bool = setting(True, "Give advantages mean 0 and variance 1.", "ours: Ziegler et al. 2019")
    whiten_rewards: bool = setting(
        False, "Give rewards a standard deviation of 1; their mean stays.", "ours: only the bias (§3.5)"
    )
    kl_estimator: str = setting(
        "k1",
        "Estimator of the KL divergence to the reference in the reward: 'k1' (log ratio, equation 2) or 'k3' "
        "(non-negative).",
        "§3.5",
        ["k1", "k3"],
    )
    kl_target: float | None = setting(
        None,
        "KL to the reference to hold, in nats per answer, by adapting beta after every iteration; None keeps beta.",
        "ours: the paper's beta is fixed; Ziegler et al. 2019 hold 6",
    )
    kl_horizon: float = setting(
        10_000, "Episodes in which beta changes by a fifth while the KL is far from kl_target.", "ours: Ziegler 2019"
    )
    stop_kl: float | None = setting(
        None,
        "Stop where objective/kl, in nats per answer, is above this.",
        "ours: unset only warns",
    )
    compare_without_ptx: bool = setting(
        False, "Also train with ptx_coef 0, into `ppo/`, to measure what the pretraining gradient preserves.", "ours"
    )
    rollout_batch_size: int | None = setting(
        None,
        "Answers that one process generates at once; None generates all of an iteration. Bounds the memory of the "
        "key-value cache. Continuous batching and vLLM bound theirs themselves.",
        "ours: all at once is fastest where it fits",
    )
    rollout_log_samples: int = setting(4, "Rollouts of each iteration kept in rollouts.jsonl.", "ours")
    total_episodes: int | None = setting(
        256_000, "Episodes sampled in the whole stage; max_steps, in optimizer steps, replaces it.", "C.4: 256k"
    )
    max_prompt_length: int | None = setting(
        1024, "Prompts with more tokens are left out.", "App C: prompts over 1k tokens are dropped"
    )
    learning_rate: float = changed(
        trl.RLOOConfig,
        "learning_rate",
        5e-6,
        "ours: not stated; E.9 scans 2.55e-6 to 2.55e-5, plain PPO diverges early",
    )
    beta: float = changed(trl.RLOOConfig, "beta", 0.02, "C.4")
    epsilon: float = changed(trl.RLOOConfig, "epsilon", 0.2, "C.4")
    num_iterations: int = changed(trl.RLOOConfig, "num_iterations", 1, "C.4: one inner epoch")
    temperature: float = changed(trl.RLOOConfig, "temperature", 1.0, "C.4")
    num_generations: int = changed(trl.RLOOConfig, "num_generations", 1, "C.4: one completion per prompt")
    max_completion_length: int = changed(trl.RLOOConfig, "max_completion_length", 1024, "App C: at most 1k tokens")
    generation_batch_size: int = changed(trl.RLOOConfig, "generation_batch_size", 512, "C.4")
    per_device_train_batch_size: int = changed(
        trl.RLOOConfig, "per_device_train_batch_size", 8, "C.4: minibatch of 64 episodes"
    )
    gradient_accumulation_steps: int = changed(
        trl.RLOOConfig, "gradient_accumulation_steps", 8, "C.4: minibatch of 64 episodes"
    )
    lr_scheduler_type: SchedulerType | str = changed(
        trl.RLOOConfig, "lr_scheduler_type", "constant", "C.4: constant after warm-up"
    )
    adam_beta2: float = changed(trl.RLOOConfig, "adam_beta2", 0.95, _BETA2)
    disable_dropout: bool = changed(
        trl.RLOOConfig, "disable_dropout", True, "ours: log-probabilities must not depend on the forward pass"
    )
    logging_steps: float | None = changed(trl.RLOOConfig, "logging_steps", None, "ours: one record per iteration")
    save_steps: float | None = changed(trl.RLOOConfig, "save_steps", None, "ours: every 10 iterations")
    save_total_limit: int | None = changed(
        trl.RLOOConfig, "save_total_limit", 2, "ours: the newest may be of a policy that turns out to be broken"
    )
    gradient_checkpointing: bool = changed(trl.RLOOConfig, "gradient_checkpointing", False, _CHECKPOINTING)
    bf16: bool | None = changed(trl.RLOOConfig, "bf16", None, _PRECISION)
    report_to: str | list[str] | None = changed(trl.RLOOConfig, "report_to", "none", "ours")

    @property
    def minibatch_size(self) -> int:
        """Episodes per optimizer step, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * world_size()

    @property
    def optimizer_steps_per_iteration(self) -> int:
        """Optimizer steps taken on one batch of rollouts."""
        return steps_per_iteration(self.generation_batch_size, self.minibatch_size, self.num_iterations)

    def __post_init__(self) -> None:
        _check(self, "ppo")
        self._set_lengths()
        _before_upstream(self)
        # RLOO's baseline needs two completions per prompt, so its config refuses fewer; ours is the value model. The
        # values below satisfy every check of RLOOConfig (a group is the whole batch), and one per prompt comes back.
        self.num_generations, self.num_generations_eval = self.generation_batch_size, 1
        super().__post_init__()
        self.num_generations = 1

    def _set_lengths(self) -> None:
        steps = self.optimizer_steps_per_iteration
        if self.max_steps <= 0 and self.total_episodes is not None:
            self.max_steps = self.total_episodes // self.generation_batch_size * steps
        if self.logging_steps is None:
            self.logging_steps = steps
        if self.save_steps is None:
            self.save_steps = 10 * steps
        # RLOOConfig takes one of the two. After construction both are set, so a copy of this config passes both.
        if self.steps_per_generation == self.generation_batch_size // (
            self.per_device_train_batch_size * world_size()
        ):
            self.steps_per_generation = None
