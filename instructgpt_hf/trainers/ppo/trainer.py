"""Stage 3: PPO and PPO-ptx on trl.RLOOTrainer (InstructGPT §3.5, C.4).

TRL keeps what it maintains: model preparation, generation (transformers, continuous batching, vLLM), reward functions,
samplers, logging, DeepSpeed and FSDP. This module replaces the algorithm: per-token KL penalty, GAE with a value
model, clipped policy and value losses per token, and the pretraining gradient.
"""

from __future__ import annotations

import copy
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instructgpt_hf._compat.peft import REFERENCE_ADAPTER
from instructgpt_hf._compat.quirks import disable_dropout, keep_trained_weights, restore_cpu_gradients, use_own_forward
from instructgpt_hf._compat.trainers import OnPolicyTrainer
from instructgpt_hf.data.pretraining import PretrainingStream
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.functional import (
    adapted_kl_weight,
    gae,
    kl_estimate,
    loss_denominator,
    masked_whiten,
    predicted_mask,
    token_rewards,
    whiten_rewards,
)
from instructgpt_hf.models.actor_critic import ActorCritic
from instructgpt_hf.models.adapters import using_adapter
from instructgpt_hf.models.decoding import LogitsNotFinite
from instructgpt_hf.models.loading import keep_half
from instructgpt_hf.models.sampling import is_finished
from instructgpt_hf.trainers.ppo import state as checkpoints
from instructgpt_hf.trainers.ppo.ema import WeightAverage
from instructgpt_hf.trainers.ppo.generation import generate_continuously, in_batches, prepare_generation
from instructgpt_hf.trainers.ppo.losses import policy_term, value_term
from instructgpt_hf.trainers.ppo.metrics import PhaseClock, count_tokens, gather_rows, rollout_metrics, training_tokens
from instructgpt_hf.trainers.ppo.optimization import GradientComparison, apply_rates, make_scheduler, parameter_groups
from instructgpt_hf.trainers.ppo.rewards import RewardModelFunction, as_reward_functions, combined_scores, distinct
from instructgpt_hf.trainers.ppo.rollouts import (
    Batch,
    EpisodeSampler,
    by_length,
    deal,
    model_batch,
    pad_rollouts,
    place,
    select,
    sorted_by_length,
)
from instructgpt_hf.trainers.ppo.state import trainable_weights
from instructgpt_hf.trainers.ppo.watchdog import Guard, TrainingStopped, all_finite


class PPOTrainer(OnPolicyTrainer):
    """PPO with a value model, and PPO-ptx, on TRL's on-policy trainer.

    One iteration samples `args.generation_batch_size` episodes, one completion for each prompt, and makes
    `args.optimizer_steps_per_iteration` optimizer steps. Each step minimises, over a minibatch's completion tokens,

        policy loss + vf_coef * value loss + ptx_coef * pretraining loss

    whose last term is about `ptx_episodes_ratio` pretraining examples per episode. `policy_loss_reduction` and
    `ptx_loss_reduction` say what the first and the last are divided by; the value loss is a mean over tokens. The
    gradients are accumulated in the same buffers by consecutive backward passes (C.4).

    Args:
        model: policy, a causal language model or PEFT model; its state at construction is also the KL reference.
        reward_model: a reward model that reads the policy's token ids, a `TextRewardModel` with another tokenizer, a
            Python function with TRL's reward function signature, or a list of these, weighted by
            `args.reward_weights`.
        value_model: sequence classifier with a scalar head, a copy of the reward model (§3.5).
        args: `PPOConfig`.
        train_dataset: column `prompt`; other columns are passed to reward functions.
        processing_class: the policy's tokenizer, with a padding token that differs from EOS.
        prompt_format: how prompts become token ids.
        pretraining_dataset: column `text`; needed if `args.ptx_coef > 0`.
        ref_model: another KL reference than the policy's start.
        kwargs: for `trl.RLOOTrainer`: callbacks, eval_dataset, ...

    Raises:
        ValueError: if there are fewer prompts than episodes in an iteration, or `ptx_coef > 0` without text.
    """

    _tag_names = ("trl", "ppo")
    _name = "PPO"
    _paper = {  # noqa: RUF012 - TRL reads a plain class attribute
        "title": "Training language models to follow instructions with human feedback",
        "id": "2203.02155",
        "citation": textwrap.dedent("""\
            @inproceedings{ouyang2022training,
                title     = {Training language models to follow instructions with human feedback},
                author    = {Long Ouyang and others},
                year      = 2022,
                booktitle = {Advances in Neural Information Processing Systems}
            }"""),
    }

    def __init__(
        self,
        model: Any,
        reward_model: Any,
        value_model: Any,
        args: Any,
        *,
        train_dataset: Any,
        processing_class: Any,
        prompt_format: PromptFormat,
        pretraining_dataset: Any = None,
        ref_model: Any = None,
        **kwargs: Any,
    ) -> None:
        _check_sizes(args, train_dataset, pretraining_dataset)
        self.prompt_format = prompt_format
        functions = as_reward_functions(reward_model, self)
        use_own_forward(model)
        if ref_model is None and not hasattr(model, "peft_config"):
            ref_model = copy.deepcopy(model)
        if ref_model is not None:
            use_own_forward(ref_model)
        # With beta = 0 the parent builds no reference from disk; ours is a copy, or the adapter "ref" that the parent
        # adds to a PEFT policy.
        beta, args.beta = args.beta, 0.0
        try:
            with keep_trained_weights(model):
                super().__init__(
                    model=model,
                    reward_funcs=functions,
                    args=args,
                    train_dataset=train_dataset,
                    processing_class=processing_class,
                    **kwargs,
                )
        finally:
            args.beta = beta
        self.beta = beta
        for item in (model, value_model):
            restore_cpu_gradients(item)
        self.ref_model = self._frozen(ref_model)
        self.reward_func_names = distinct(self.reward_func_names)
        for function in functions:
            if isinstance(function, RewardModelFunction):
                self._frozen(function.model)
        if args.disable_dropout:
            for item in (model, value_model):
                disable_dropout(item)
        _freeze_reference_adapter(model)
        value_model = value_model.to(self.accelerator.device).train()
        limits = args.min_completion_length, self.eos_token_ids
        self.actor_critic = ActorCritic(model, value_model, self.temperature, *limits)
        self.model = self.model_wrapped = self.actor_critic
        policy_parameters = self.actor_critic.role_parameters("policy")
        self.average = WeightAverage(policy_parameters, args.ema_decay) if args.ema_decay else None
        if self.average is not None:
            self.add_callback(self.average)
        self.guard = Guard(args, self._all_finite, self.accelerator.scaler is not None)
        self.clock = PhaseClock(args.optimizer_steps_per_iteration, self.record)
        self.add_callback(self.guard)
        self.add_callback(self.clock)
        self.pretraining = self._pretraining_stream(pretraining_dataset)
        self.samples: list[dict[str, Any]] = []
        prepare_generation(self)

    def _frozen(self, model: Any) -> Any:
        if model is None:
            return None
        model.requires_grad_(False)
        if self.args.bf16 or self.args.fp16:
            keep_half(model, torch.bfloat16 if self.args.bf16 else torch.float16)
        return self.accelerator.prepare_model(model.eval(), evaluation_mode=True)

    def _pretraining_stream(self, dataset: Any) -> PretrainingStream | None:
        if not self.args.ptx_coef:
            return None
        return PretrainingStream(
            dataset,
            self.tokenizer,
            self.args.ptx_max_length,
            self.args.seed,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )

    @property
    def iteration(self) -> int:
        """Batches of rollouts used up so far."""
        return int(self.state.global_step) // self.args.optimizer_steps_per_iteration

    # Rollouts

    def episode_sampler(self, dataset: Any) -> EpisodeSampler:
        """The order of the prompts."""
        return EpisodeSampler(
            size=len(dataset),
            episodes=self.args.generation_batch_size,
            repeats=self.args.steps_per_generation * self.num_iterations,
            steps=self.args.optimizer_steps_per_iteration,
            seed=self.args.seed,
            shuffle=self.shuffle_dataset,
            step=lambda: self.state.global_step,
        )

    def render_prompt(self, prompt: Any) -> list[int]:
        """Token ids of a prompt as every stage renders it."""
        return self.prompt_format.prompt_ids(prompt, self.tokenizer)

    def in_batches(self, generate: Callable[..., list[list[int]]], prompt_ids: list[list[int]]) -> list[list[int]]:
        """Completions by transformers' `generate`, `args.rollout_batch_size` at once."""
        return in_batches(generate, prompt_ids, self.args.rollout_batch_size)

    def continuous_batching(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """Completions by transformers' continuous batching."""
        return generate_continuously(self, prompt_ids)

    def to_device(self, batch: Batch) -> Batch:
        """The batch on this process's device."""
        return {key: value.to(self.accelerator.device) for key, value in batch.items()}

    def rollout(self, inputs: list[dict[str, Any]]) -> Batch:
        """Sample one completion per prompt and turn its score into advantages and returns.

        Args:
            inputs: rows of the dataset, this process's share.

        Returns:
            The padded rollouts (see `pad_rollouts`) with `logps`, `values`, `advantages` and `returns`, each [B, T]
            and 0 outside the completion mask.
        """
        prompts = [row["prompt"] for row in inputs]
        training = self.model.training
        if training:
            self.clock.start()
        prompt_ids, completion_ids, completions = self._sample(prompts)
        sampled, tokens = count_tokens(prompt_ids, completion_ids, self.accelerator)
        self.clock.end("generate", sampled)
        batch = self.to_device(pad_rollouts(prompt_ids, completion_ids, self.tokenizer.pad_token_id))
        rewards = self.rewards(inputs, prompts, completions, completion_ids)
        finished = torch.tensor(is_finished(completion_ids, self.eos_token_ids), device=rewards.device)
        scores = self._scores(rewards, finished)
        reference = self._evaluate_policies(batch)
        mask = batch["completion_mask"]
        kl = kl_estimate(batch["logps"], reference, self.args.kl_estimator)
        token_level = token_rewards(scores, kl, mask, self.beta)
        if self.args.whiten_rewards:
            token_level = self._over_all_processes(whiten_rewards, token_level, mask)
        advantages, batch["returns"] = gae(token_level, batch["values"], mask, self.args.gamma, self.args.lam)
        if self.args.whiten_advantages:
            advantages = self._over_all_processes(masked_whiten, advantages, mask)
        batch["advantages"] = advantages
        for name, value in rollout_metrics(self, batch, scores, reference, finished, completion_ids).items():
            self.record(name, value)
        self.clock.end("score", tokens)
        self.record_samples(prompts, completions, self._local(rewards), advantages.sum(1).tolist())
        if training:
            self.clock.training_tokens = training_tokens(self.args, tokens, self.value_only)
            self._finish_rollouts(rewards)
        self._keep_samples(prompts, completions, scores)
        return batch

    def _sample(self, prompts: list[Any]) -> Any:
        """`generate`, which a policy in training that has no finite logits ends cleanly."""
        try:
            return self.generate(prompts)
        except LogitsNotFinite as error:
            if not self.model.training:
                raise
            raise self.guard.unusable_rollouts(self.state.global_step, str(error).rstrip(".")) from None

    def _finish_rollouts(self, rewards: Tensor) -> None:
        """Stop if the rollouts are unusable; the next iteration's weight of the KL penalty."""
        models = [index for index, item in enumerate(self.reward_funcs) if isinstance(item, RewardModelFunction)]
        if rewards[:, models].isnan().any():  # where a function gives NaN, it does not apply
            self.guard.see("a reward model's score", float("nan"))
        try:
            self.guard.rollouts_done(self.state.global_step)
        except TrainingStopped:
            self.log({})  # so that the trackers show this iteration too
            raise
        if self.args.kl_target is not None and not self.value_only:
            kl = self.guard.seen["objective/kl"][-1]
            episodes = self.args.generation_batch_size
            self.beta = adapted_kl_weight(self.beta, kl, self.args.kl_target, episodes, self.args.kl_horizon)

    @property
    def value_only(self) -> bool:
        """Whether this iteration trains the value model alone."""
        return self.iteration < int(self.args.value_warmup_iterations)

    def _keep_samples(self, prompts: list[Any], completions: list[Any], scores: Tensor) -> None:
        """Note the first few rollouts of the iteration for `rollouts.jsonl`."""
        if not self.model.training:
            return
        for row in range(min(self.args.rollout_log_samples, len(prompts))):
            self.samples.append(
                {
                    "iteration": self.iteration + 1,
                    "prompt": prompts[row],
                    "completion": completions[row],
                    "score": scores[row].item(),
                }
            )

    def _local(self, gathered: Tensor) -> Tensor:
        size = gathered.shape[0] // self.accelerator.num_processes
        return gathered[self.accelerator.process_index * size :][:size]

    def _scores(self, rewards: Tensor, finished: Tensor) -> Tensor:
        """Score [B] of this process's answers from the rewards of all; logs the mean of every reward."""
        for name, mean in zip(self.reward_func_names, rewards.nanmean(dim=0).tolist(), strict=True):
            if not math.isnan(mean):
                self.record(f"rewards/{name}", mean)
        return combined_scores(
            self._local(rewards),
            self.reward_weights,
            finished,
            self.reward_clip_range,
            self.args.missing_eos_penalty,
            self.args.missing_eos_score,
        )

    @torch.no_grad()
    def _evaluate_policies(self, batch: Batch) -> Tensor:
        """Add the policy's log-probabilities and values to the batch; return the reference's log-probabilities."""
        shape, device = batch["completion_ids"].shape, self.accelerator.device
        for key in ("logps", "values"):
            batch[key] = torch.zeros(shape, device=device)
        reference = torch.zeros(shape, device=device)
        model = self.accelerator.unwrap_model(self.model_wrapped)
        tokens = {key: batch[key] for key in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
        for rows, piece in by_length(tokens, self.args.per_device_eval_batch_size):
            ids, mask, length = model_batch(piece)
            real = piece["completion_mask"]
            with self.accelerator.autocast():
                output = model(ids, mask, length)
                ref_logps = self._reference_log_probs(model.policy, ids, mask, length)
            place(batch["logps"], rows, output.logps * real)
            place(batch["values"], rows, output.values * real)
            place(reference, rows, ref_logps * real)
        return reference

    def _reference_log_probs(self, policy: Any, ids: Tensor, mask: Tensor, length: int) -> Tensor:
        if self.ref_model is not None:
            return self.actor_critic.log_probs(self.ref_model, ids, mask, length)[0]
        with using_adapter(policy, REFERENCE_ADAPTER):
            return self.actor_critic.log_probs(policy, ids, mask, length)[0]

    def _over_all_processes(self, function: Callable[..., Tensor], values: Tensor, mask: Tensor) -> Tensor:
        """Apply a batch statistic over the episodes of all processes and return this process's rows."""
        return self._local(function(*gather_rows(self.accelerator, values, mask)))[:, : values.shape[1]]

    # Optimization

    def minibatches(self, batch: Batch) -> list[Batch]:
        """The rollouts in random order as minibatches, each split into micro-batches of rows of similar length, which
        carry what their minibatch's losses are divided by.

        With the minibatch's denominators, gradients do not depend on how it is split.
        """
        size = self.args.per_device_train_batch_size
        kinds = {"denominator": "token_mean", "policy_denominator": self.args.policy_loss_reduction}
        pieces = []
        for rows in self._minibatch_rows():
            rows = sorted_by_length(batch, rows.to(self.accelerator.device))
            minibatch = [select(batch, part) for part in rows.split(size)]
            pieces += minibatch
            counts = [
                torch.stack([loss_denominator(piece["completion_mask"], kind) for kind in kinds.values()])
                for piece in minibatch
            ]
            # Gradients are averaged over processes, so each uses the mean count.
            shared = self.accelerator.reduce(torch.stack(counts).sum(0).float(), reduction="mean")
            for piece in minibatch:
                piece.update(zip(kinds, shared, strict=True))
        return pieces

    def _minibatch_rows(self) -> tuple[Tensor, ...]:
        """This process's rows of each minibatch of the present iteration."""
        args = self.args
        return deal(
            args.generation_batch_size,
            args.generation_batch_size // args.minibatch_size,
            args.seed * 1_000_003 + self.iteration,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )

    def minibatch_loss(self, model: Any, inputs: Batch) -> Tensor:
        """Policy loss + vf_coef * value loss of one micro-batch.

        The value model's gradient is accumulated here, before the policy runs, so that the activations of one of
        them are held at a time; the loss that is returned has the policy's gradient only. While the value model is
        trained alone, it has the value model's.
        """
        if self.value_only:
            with torch.no_grad():
                self._policy_loss(model, inputs)
            return self._value_loss(model, inputs)
        with self.without_gradient_sync(model):
            value = self._value_loss(model, inputs)
            if torch.is_grad_enabled():  # not in an evaluation
                self.backward(value)
        return self._policy_loss(model, inputs) + value.detach()

    @property
    def _complete(self) -> bool:
        """Whether a pass of one role has to give the other one a gradient of 0.

        DDP synchronises once every parameter has a gradient. DeepSpeed empties the buffers of gradients that it keeps
        in the CPU's memory by writing those of a step's first pass over them.
        """
        synchronises = self.accelerator.num_processes > 1 and self.accelerator.sync_gradients
        return bool(self.is_deepspeed_enabled or synchronises)

    def _policy_loss(self, model: Any, inputs: Batch) -> Tensor:
        output = model(*model_batch(inputs), with_entropy=True, role="policy", complete=self._complete)
        steps = self.args.gradient_accumulation_steps
        loss, metrics = policy_term(output, inputs, self.epsilon_low, self.epsilon_high, steps)
        self._record_means(metrics)
        return loss

    def _value_loss(self, model: Any, inputs: Batch) -> Tensor:
        values = model(*model_batch(inputs), role="value_model", complete=self._complete).values
        steps = self.args.gradient_accumulation_steps
        loss, metrics = value_term(values, inputs, self.args.cliprange_value, steps)
        self._record_means(metrics)
        return self.args.vf_coef * loss

    def _record_means(self, values: dict[str, Tensor]) -> None:
        means = self.accelerator.reduce(torch.stack([item.detach().float() for item in values.values()]), "mean")
        for name, value in zip(values, means.tolist(), strict=True):
            self.record(name, value)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The PPO gradient and, for PPO-ptx, the pretraining gradient of one micro-batch (C.4).

        The paper accumulates the two in consecutive steps; here the pretraining pass comes first, without gradient
        synchronisation, so that distributed wrappers synchronise the sum once.
        """
        if self.pretraining is None or self.value_only:
            return super().training_step(model, inputs, num_items_in_batch)
        first = self.micro_step % (self.args.steps_per_generation * self.num_iterations) == 0
        model.train()
        with self.before_training_step(inputs):
            self._pretraining_backward(model, self.pretraining)
        if not first or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super().training_step(model, inputs, num_items_in_batch)
        with GradientComparison(self.actor_critic.role_parameters("policy").values()) as comparison:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._record_means({"grad_norm_ratio_ptx": comparison.ratio, "grad_cosine_ptx": comparison.cosine})
        return loss

    def _pretraining_backward(self, model: Any, stream: PretrainingStream) -> None:
        """Accumulate the gradient of ptx_coef times the next-token loss on pretraining text."""
        rows = self.args.ptx_episodes_ratio * self.args.per_device_train_batch_size
        blocks = torch.tensor([next(stream) for _ in range(rows)], device=self.accelerator.device)
        steps, counted = self.args.gradient_accumulation_steps, predicted_mask(torch.ones_like(blocks))
        denominator = loss_denominator(counted, self.args.ptx_loss_reduction) * steps
        total = torch.zeros((), device=self.accelerator.device)
        with self.without_gradient_sync(model):
            for piece in blocks.split(self.args.per_device_train_batch_size):
                with self.compute_loss_context_manager():
                    loss = model(piece, torch.ones_like(piece), complete=self._complete).lm_loss
                self.backward(self.args.ptx_coef * loss / denominator)
                total += loss.detach()
        self._record_means({"loss/ptx": total / counted.sum()})

    def gradient_done(self, norm: Any) -> None:
        """Called with the gradient's norm before an optimizer step."""
        self.guard.gradient_done(self.state.global_step, norm)
        if self.value_only:
            # Without gradients the optimizer leaves weights and their state alone.
            for parameter in self.actor_critic.role_parameters("policy").values():
                parameter.grad = None

    def record(self, name: str, value: float) -> None:
        """Add a value to a metric that is averaged until the next log; the guard sees those of training."""
        if self.model.training:
            self.guard.see(name, value)
        super().record(name, value)

    def _all_finite(self) -> bool:
        finite = all_finite(list(trainable_weights(self.actor_critic).values()))
        # Of sharded weights, a process sees its own.
        return bool(self.accelerator.gather(finite.reshape(1)).all())

    def create_optimizer(self, model: Any = None) -> Any:
        """One optimizer; the value model's parameters have their own learning rate (C.4)."""
        if self.optimizer is None:
            module = self.actor_critic
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, module)
            decayed = set(self.get_decay_parameter_names(module))
            self.optimizer = optimizer_class(parameter_groups(self.args, module, decayed), **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The policy's learning rate follows `policy_factor`; the value model's is fixed (C.4)."""
        if self.lr_scheduler is None:
            self.lr_scheduler = make_scheduler(self.args, optimizer or self.optimizer)
        return self.lr_scheduler

    def set_learning_rates(self) -> None:
        """Called once a resumed run has read its optimizer and scheduler."""
        apply_rates(self.args, self.optimizer, self.lr_scheduler)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log with the iteration and the number of episodes."""
        iteration = self.state.global_step / self.args.optimizer_steps_per_iteration
        logs["iteration"] = iteration
        logs["episode"] = round(iteration * self.args.generation_batch_size)
        if "train_loss" in logs:
            logs["train_loss"] = self.mean_loss
        super().log(logs, start_time)

    # Saving

    def save_models(self, output_dir: str) -> None:
        """Write what a checkpoint needs to resume: trainable weights, their average, the pretraining position."""
        checkpoints.write(self, Path(output_dir))

    def load_models(self, checkpoint: str) -> None:
        """Read what `save_models` wrote."""
        checkpoints.read_weights(self, Path(checkpoint))
        self.load_state(checkpoint)

    def load_state(self, checkpoint: str) -> None:
        """Read what `save_models` wrote, apart from the trainable weights."""
        checkpoints.read_state(self, Path(checkpoint))

    def save_pretrained(self, folder: Path) -> None:
        """Write the stage's models: the policy, `value_model/`, and the weights that are not published; and the
        rollouts noted during training, `rollouts.jsonl`.

        With `publish_weights: raw` the averaged policy goes to `ema/`, with `ema` the last one goes to `raw/`.
        """
        checkpoints.write_models(self, folder)


def _check_sizes(args: Any, train_dataset: Any, pretraining_dataset: Any) -> None:
    if hasattr(train_dataset, "__len__") and len(train_dataset) < args.generation_batch_size:
        raise ValueError(
            f"train_dataset has {len(train_dataset)} prompts, fewer than generation_batch_size="
            f"{args.generation_batch_size} episodes of one iteration; add prompts or lower generation_batch_size."
        )
    if args.ptx_coef and pretraining_dataset is None:
        raise ValueError(f"ptx_coef={args.ptx_coef} needs a pretraining_dataset; set ptx_coef to 0 for plain PPO.")


def _freeze_reference_adapter(policy: Any) -> None:
    for name, parameter in policy.named_parameters():
        if f".{REFERENCE_ADAPTER}." in name:
            parameter.requires_grad_(False)
            # Of a quantised model, TRL may have rounded the copy.
            parameter.data = policy.get_parameter(name.replace(f".{REFERENCE_ADAPTER}.", ".default.")).data.clone()
