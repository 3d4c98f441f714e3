"""Stage 3: PPO and PPO-ptx on trl.RLOOTrainer (InstructGPT §3.5, C.4)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from instructgpt_hf._compat.peft import freeze_reference_adapter
from instructgpt_hf._compat.quirks import (
    disable_dropout,
    keep_trained_weights,
    no_reference_from_disk,
    restore_cpu_gradients,
)
from instructgpt_hf.config.ppo import PPOConfig
from instructgpt_hf.data.prompts import Prompt, PromptFormat
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.functional import adapted_kl_weight, kl_estimate
from instructgpt_hf.models.actor_critic import ActorCritic
from instructgpt_hf.models.decoding import LogitsNotFinite
from instructgpt_hf.models.sampling import is_finished
from instructgpt_hf.models.vocabulary import Vocabulary
from instructgpt_hf.trainers.inputs import ModelSource, chosen_format, refuse, settled_args
from instructgpt_hf.trainers.ppo import generation, reference, state
from instructgpt_hf.trainers.ppo.ema import WeightAverage
from instructgpt_hf.trainers.ppo.functions import check_columns
from instructgpt_hf.trainers.ppo.metrics import PhaseClock, count_tokens, rollout_metrics, training_tokens
from instructgpt_hf.trainers.ppo.optimization import PPOOptimization
from instructgpt_hf.trainers.ppo.rewards import (
    Reward,
    RewardModelFunction,
    SampledIds,
    as_reward_functions,
    combined_scores,
    distinct,
    placeholder,
)
from instructgpt_hf.trainers.ppo.rollouts import (
    EpisodeSampler,
    Rollouts,
    TokenLists,
    Tokens,
    estimate_advantages,
    own_rows,
)
from instructgpt_hf.trainers.ppo.scorers import Scorers, listed
from instructgpt_hf.trainers.ppo.watchdog import EarlyWarnings, Guard, TrainingStopped, all_finite
from instructgpt_hf.trainers.rows import RowReader, each, training_rows

logger = logging.getLogger(__name__)

_REFUSED = {
    "compute_metrics": "PPO has no predictions to measure; a reward function's log_metric adds to the log.",
    "data_collator": "is the trainer's own; prompts are padded when they are sampled from.",
    "formatting_func": "apply it before: dataset.map(...) to the column prompt.",
    "preprocess_logits_for_metrics": "PPO has no predictions to measure.",
}
FRESH_VALUE_MODEL = (
    "The value model starts from the policy with a random head, so its first advantages are noise. Set "
    "value_warmup_iterations (to 5, for example): in these first iterations it is trained alone."
)


class PPOTrainer(PPOOptimization):
    """PPO with a value model, and PPO-ptx, on TRL's on-policy trainer.

    One iteration samples `args.generation_batch_size` episodes, one completion for each prompt, and makes
    `args.optimizer_steps_per_iteration` optimizer steps. Each step minimises, over a minibatch's completion tokens,
    equation 2 as `functional.ppo_ptx_loss`: policy loss + vf_coef * value loss + ptx_coef * pretraining loss, whose
    last term is about `ptx_episodes_ratio` pretraining examples per episode. `policy_loss_reduction` and
    `ptx_loss_reduction` say what the first and the last are divided by; the value loss is a mean over tokens. The
    gradients are accumulated in the same buffers by consecutive backward passes (C.4).

    | TRL's and the Trainer's | this package's |
    |---|---|
    | placing models, the adapter "ref", DeepSpeed, FSDP | policy and value model in one `ActorCritic` |
    | sampling: transformers, continuous batching, vLLM | prompts: rendering, order, batches of similar length |
    | calls of reward functions, `log_metric`, `log_extra` | reward models on the sampled ids; one score |
    | the dataloader, prompts per iteration, inner epochs | KL penalty per token, GAE, whitening, minibatches |
    | training loop, mixed precision, clipping the gradient | losses per token, pretraining gradient, value warm-up |
    | the optimizer class and its options | learning rate per role with the warm-up of C.4 |
    | logging, trackers, table of completions | the metrics of docs/ppo.md, early warnings, stops |
    | optimizer, scheduler and random state in checkpoints | weights, their average, text position; whole folders |
    | `push_to_hub` | the files that it pushes, private, without TRL's model card |

    It inherits from RLOOTrainer, the trainer in TRL that samples completions and calls reward functions, so that the
    left column comes with every TRL release; docs/architecture.md lists the price.

    Args:
        model: the policy: Hub id or folder of a causal language model, whole or adapter, or `"lab"`; or one in
            memory. Its state at construction is also the KL reference.
        reward_funcs: a reward model (its name, or in memory), a function with TRL's reward function signature, or a
            list of these, weighted by `args.reward_weights`. A reward model with the policy's tokenizer and prompt
            format reads the sampled token ids, another one the text (`TextRewardModel`).
        args: `PPOConfig`; without `pretraining_dataset` plain PPO by default.
        train_dataset: column `prompt` (text or messages), those over `max_prompt_length` left out; other columns are
            passed to reward functions.
        eval_dataset: the same, or a dict of several by name.
        processing_class: the policy's tokenizer, the model's own by default.
        reward_processing_classes: tokenizers of the reward models, in the order of `reward_funcs`; their own by
            default.
        callbacks, optimizers: as in `trl.RLOOTrainer`.
        quantization_config: of the frozen weights of a policy by its name.
        peft_config: of the adapters of policy and value model.
        value_model: sequence classifier with a scalar head, by its name or in memory; by default a copy of the first
            reward model that reads token ids (§3.5), or without one a copy of the policy with a random head, which
            needs `value_warmup_iterations`.
        prompt_format: a `PromptFormat` or its name; by default the one that the policy was trained with, the
            tokenizer's chat template, or without one the prompt as it is.
        pretraining_dataset: column `text`; needed if `args.ptx_coef > 0`.
        ref_model: another KL reference than the policy's start.
        reward_model: another name of `reward_funcs`.

    Raises:
        InstructGPTError: if models, data or settings cannot be used: fewer prompts than episodes in an iteration,
            `ptx_coef > 0` without text, a model with fewer embeddings than the tokenizer whose ids it reads.
    """

    _tag_names = ("trl", "ppo")

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: PPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: LoraConfig | None = None,
        *,
        value_model: str | Path | nn.Module | None = None,
        prompt_format: PromptFormat | str | None = None,
        pretraining_dataset: Dataset | IterableDataset | None = None,
        ref_model: PreTrainedModel | None = None,
        reward_model: Any = None,
        **kwargs: Any,
    ) -> None:
        refuse(kwargs, _REFUSED)
        rewards = _rewards(reward_funcs, reward_model)
        defaults = {"ptx_coef": 0.0} if pretraining_dataset is None else {}
        args = settled_args(args, PPOConfig, model, "PPO", **defaults)
        _check_text(args, pretraining_dataset)
        set_seed(args.seed)
        source = ModelSource(model, args, quantization_config)
        tokenizer = source.tokenizer(processing_class)
        self.prompt_format = chosen_format(prompt_format, tokenizer, source.folder)
        self.reader = RowReader.of(self.prompt_format, tokenizer, source.config, args.max_prompt_length)
        prompts = training_rows(train_dataset, self.reader.prompts)
        _check_size(args, prompts)
        held_out = each(eval_dataset, "eval_dataset", self.reader.prompts)
        policy = source.policy(tokenizer, peft_config)
        scorers = Scorers(
            policy, tokenizer, self.prompt_format, args.seed, source.adapter(peft_config, "SEQ_CLS"), source.options
        )
        reward_tokenizers = [None] * len(rewards) if reward_processing_classes is None else reward_processing_classes
        rewards, value_model, fresh = scorers.load(rewards, listed(reward_tokenizers), value_model)
        if fresh and not args.value_warmup_iterations:
            logger.warning(FRESH_VALUE_MODEL)
        self.vocabulary = Vocabulary(tokenizer)
        readers = [("policy", policy), ("KL reference", ref_model), ("value model", value_model)]
        readers += [("reward model", item) for item in rewards if isinstance(item, nn.Module)]
        for role, reader in readers:
            self.vocabulary.check_reader(reader, role)
        ref_model = reference.reference_of(policy, ref_model)
        with no_reference_from_disk(args), keep_trained_weights(policy):
            super().__init__(
                model=policy,
                reward_funcs=[placeholder(reward) for reward in rewards],
                args=args,
                train_dataset=prompts,
                eval_dataset=held_out,
                processing_class=tokenizer,
                callbacks=callbacks,
                optimizers=optimizers,
                **kwargs,
            )
        self.beta = args.beta
        restore_cpu_gradients(policy)
        restore_cpu_gradients(value_model)
        self.ref_model = None if ref_model is None else reference.frozen(ref_model, args, self.accelerator)
        self._set_rewards(rewards)
        self._join_models(policy, value_model)
        self._add_callbacks()
        self.pretraining = self.pretraining_stream(pretraining_dataset) if args.ptx_coef else None
        self.samples: list[dict[str, Any]] = []
        self._prepare_generation(policy)

    def _set_rewards(self, rewards: list[Reward]) -> None:
        """Put the rewards in the place of their placeholders, and freeze the reward models."""
        self.sampled = SampledIds(self.prompt_format, self.tokenizer, self.eos_token_ids)
        batch_size = self.args.per_device_eval_batch_size
        self.reward_funcs = as_reward_functions(rewards, self.sampled, self.accelerator, batch_size)
        self.reward_func_names = distinct(self.reward_func_names)
        for function in self.reward_funcs:
            if isinstance(function, RewardModelFunction):
                reference.frozen(function.model, self.args, self.accelerator)
            else:
                check_columns(self.train_dataset.column_names or (), "train_dataset")

    def _join_models(self, policy: PreTrainedModel | PeftModel, value_model: nn.Module) -> None:
        """Make policy and value model the one module that is trained."""
        if self.args.disable_dropout:
            disable_dropout(policy)
            disable_dropout(value_model)
        freeze_reference_adapter(policy)
        value_model = value_model.to(self.accelerator.device).train()
        shortest = self.args.min_completion_length
        self.actor_critic = ActorCritic(
            policy, value_model, self.temperature, shortest, self.eos_token_ids, self.vocabulary
        )
        self.model = self.model_wrapped = self.actor_critic

    def _add_callbacks(self) -> None:
        """Average of the weights, guard and clock."""
        self.average: WeightAverage | None = None
        if self.args.ema_decay:
            self.average = WeightAverage(self.actor_critic.role_parameters("policy"), self.args.ema_decay)
            self.add_callback(self.average)
        self.guard = Guard(self.args, self._all_finite, self.accelerator.scaler is not None)
        self.clock = PhaseClock(self.args.optimizer_steps_per_iteration, self.record)
        self.add_callback(self.guard)
        self.add_callback(self.clock)

    def _prepare_generation(self, policy: PreTrainedModel | PeftModel) -> None:
        """Let generation respect `min_completion_length` and sample tokens only; let vLLM use the policy's weights."""
        limits: dict[str, Any] = {}
        shortest = self.args.min_completion_length
        excluded = self.vocabulary.others(policy.config.get_text_config().vocab_size)
        if self.use_vllm:
            engine = self.vllm_generation
            generation.prepare_vllm(engine, policy, shortest, self.eos_token_ids, excluded, self.is_fsdp_enabled)
            return
        if shortest:
            limits["min_new_tokens"] = shortest
        if excluded:
            limits["suppress_tokens"] = excluded
        self.generation_config.update(**limits)
        self.generation_kwargs.update(limits)

    # Rollouts

    def episode_sampler(self, dataset: Dataset) -> EpisodeSampler:
        """Order of the prompts."""
        return EpisodeSampler(
            size=len(dataset),
            episodes=self.args.generation_batch_size,
            repeats=self.args.steps_per_generation * self.num_iterations,
            steps=self.args.optimizer_steps_per_iteration,
            seed=self.args.seed,
            shuffle=self.shuffle_dataset,
            step=lambda: self.state.global_step,
        )

    def render_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt as every stage renders it."""
        return self.prompt_format.prompt_ids(prompt, self.tokenizer)

    def in_batches(self, generate: Callable[[TokenLists], TokenLists], prompt_ids: TokenLists) -> TokenLists:
        """Completions by transformers' `generate`, `args.rollout_batch_size` prompts at a time."""
        return generation.in_batches(generate, prompt_ids, self.args.rollout_batch_size)

    def continuous_batching(self, prompt_ids: TokenLists) -> TokenLists:
        """Completions by transformers' continuous batching."""
        policy = self.accelerator.unwrap_model(self.model_wrapped).policy
        # One for every iteration and process, so that runs repeat, resumed ones too.
        seed = (self.args.seed * 1_000_003 + self.iteration) * 1_009 + self.accelerator.process_index
        return generation.generate_continuously(
            policy, prompt_ids, self.generation_config, self.continuous_batching_config, self.args, seed
        )

    def rollout(self, inputs: list[dict[str, Any]]) -> Rollouts:
        """Sample one completion per prompt and turn its score into advantages and returns."""
        args, accelerator, training = self.args, self.accelerator, self.model.training
        prompts = [row["prompt"] for row in inputs]
        if training:
            self.clock.start()
        prompt_ids, completion_ids, completions = self._sample(prompts)
        sampled, token_count = count_tokens(prompt_ids, completion_ids, accelerator)
        self.clock.end("generate", sampled)
        tokens = Tokens.pad(prompt_ids, completion_ids, self.tokenizer.pad_token_id).to(accelerator.device)
        rewards = self.rewards(inputs, prompts, completions, completion_ids)
        finished = torch.tensor(is_finished(completion_ids, self.eos_token_ids), device=rewards.device)
        scores = self._scores(rewards, finished)
        model = accelerator.unwrap_model(self.model_wrapped)
        logps, values, ref_logps = reference.evaluate(
            tokens, model, self.ref_model, args.per_device_eval_batch_size, accelerator
        )
        kl = kl_estimate(logps, ref_logps, args.kl_estimator)
        advantages, returns = estimate_advantages(
            scores, kl, values, tokens.completion_mask, self.beta, args, accelerator
        )
        rollouts = Rollouts(tokens, logps, values, advantages, returns)
        metrics = rollout_metrics(rollouts, ref_logps, kl, scores, finished, completion_ids, self.beta, accelerator)
        for name, value in metrics.items():
            self.record(name, value)
        self.clock.end("score", token_count)
        self.record_samples(prompts, completions, own_rows(accelerator, rewards), advantages.sum(1).tolist())
        if training:
            self.clock.training_tokens = training_tokens(args, token_count, self.value_only)
            self._finish_rollouts(rewards)
            self._keep_samples(prompts, completions, scores)
        return rollouts

    def _keep_samples(self, prompts: list[Prompt], completions: list[Any], scores: Tensor) -> None:
        """Keep the first few rollouts of an iteration for `rollouts.jsonl`."""
        rows = list(zip(prompts, completions, scores.tolist(), strict=True))[: self.args.rollout_log_samples]
        self.samples += [
            {"iteration": self.iteration + 1, "prompt": prompt, "completion": completion, "score": score}
            for prompt, completion, score in rows
        ]

    def _sample(self, prompts: list[Prompt]) -> tuple[TokenLists, TokenLists, list[Any]]:
        """`generate`, with the completions as the prompt format has them, text for text and a message for messages.

        In training, logits that are not finite become a clean stop.
        """
        try:
            prompt_ids, completion_ids, _ = self.generate(prompts)
        except LogitsNotFinite as error:
            if not self.model.training:
                raise
            raise self.guard.unusable_rollouts(self.state.global_step, str(error).rstrip(".")) from None
        texts = self.sampled.texts(prompts, completion_ids)
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        return prompt_ids, completion_ids, completions

    def _scores(self, rewards: Tensor, finished: Tensor) -> Tensor:
        """Score [B] of this process's completions from the rewards of all; logs the mean of every reward."""
        for name, mean in zip(self.reward_func_names, rewards.nanmean(dim=0).tolist(), strict=True):
            if not math.isnan(mean):
                self.record(f"rewards/{name}", mean)
        return combined_scores(
            own_rows(self.accelerator, rewards),
            self.reward_weights,
            finished,
            clip_range=self.reward_clip_range,
            missing_eos_penalty=self.args.missing_eos_penalty,
            missing_eos_score=self.args.missing_eos_score,
        )

    def _finish_rollouts(self, rewards: Tensor) -> None:
        """Stop if the rollouts are unusable; adapt the KL penalty's weight for the next iteration."""
        models = [index for index, item in enumerate(self.reward_funcs) if isinstance(item, RewardModelFunction)]
        if rewards[:, models].isnan().any():  # where a function gives NaN, it does not apply
            self.guard.add("a reward model's score", float("nan"))
        try:
            self.guard.rollouts_done(self.state.global_step)
        except TrainingStopped:
            self.log({})  # so that the trackers show this iteration too
            raise
        if self.args.kl_target is not None and not self.value_only:
            kl, episodes = self.guard.values["objective/kl"][-1], self.args.generation_batch_size
            self.beta = adapted_kl_weight(self.beta, kl, self.args.kl_target, episodes, self.args.kl_horizon)

    # Logging

    def _all_finite(self) -> bool:
        finite = all_finite(list(state.trainable_weights(self.actor_critic).values()))
        # Of sharded weights, a process sees its own.
        return bool(self.accelerator.gather(finite.reshape(1)).all())

    def record(self, name: str, value: float) -> None:
        """Add a value to a metric that is averaged until the next log; in training, the guard reads it too."""
        if self.model.training:
            self.guard.add(name, value)
        super().record(name, value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log with the iteration and the number of episodes."""
        iteration = self.state.global_step / self.args.optimizer_steps_per_iteration
        logs["iteration"] = iteration
        logs["episode"] = round(iteration * self.args.generation_batch_size)
        super().log(logs, start_time)

    # Saving

    def save_models(self, output_dir: str) -> None:
        """Write trainable weights, their average, and PPO's own state into a checkpoint."""
        folder = Path(output_dir)
        state.write_weights(folder, self.actor_critic, self.average)
        state.PPOState(
            pretraining=self.pretraining.state_dict() if self.pretraining is not None else None,
            samples=self.samples,
            beta={"setting": self.args.beta, "current": self.beta},
            warnings=vars(self.guard.warnings),
        ).write(folder)

    def load_models(self, checkpoint: str) -> None:
        """Read the files of `save_models`."""
        state.read_weights(Path(checkpoint), self.actor_critic)
        self.load_state(checkpoint)

    def load_state(self, checkpoint: str) -> None:
        """Read the files of `save_models` apart from the trainable weights."""
        folder = Path(checkpoint)
        if self.average is not None:
            state.read_average(folder, self.average)
        saved = state.PPOState.read(folder)
        self.samples = saved.samples
        self.guard.warnings = EarlyWarnings(**saved.warnings)
        if self.args.kl_target is not None and saved.beta["setting"] == self.args.beta:
            self.beta = saved.beta["current"]
        if self.pretraining is not None and saved.pretraining is not None:
            self.pretraining.load_state_dict(saved.pretraining)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the models for use; before a push, the rollouts get a name that is not uploaded."""
        super().save_model(output_dir, _internal_call)
        folder = Path(self.args.output_dir)
        if _internal_call and output_dir is None and self.args.should_save:
            (folder / state.SAMPLES_FILE).replace(folder / f"_{state.SAMPLES_FILE}")

    def save_pretrained(self, folder: Path) -> None:
        """Write policy, value model and the rollouts noted during training, as `state.write_models` describes."""
        save_tokenizer = partial(self.prompt_format.save_tokenizer, self.tokenizer)
        state.write_models(
            folder, self.actor_critic, self.average, save_tokenizer, self.samples, self.args.publish_weights
        )


def _rewards(reward_funcs: Any, reward_model: Any) -> list[Any]:
    """The rewards under either name."""
    if (reward_funcs is None) == (reward_model is None):
        raise InstructGPTError(
            "reward_funcs: pass a reward model, a reward function or a list of them"
            + ("." if reward_funcs is None else "; reward_model is another name of it, so only one of the two.")
        )
    rewards = listed(reward_model if reward_funcs is None else reward_funcs)
    if not rewards:
        raise InstructGPTError("reward_funcs: the list is empty.")
    return rewards


def _check_text(args: PPOConfig, pretraining_dataset: Dataset | IterableDataset | None) -> None:
    if args.ptx_coef and pretraining_dataset is None:
        raise InstructGPTError(
            f"ptx_coef={args.ptx_coef} needs a pretraining_dataset; set ptx_coef to 0 for plain PPO."
        )


def _check_size(args: PPOConfig, prompts: Dataset) -> None:
    if len(prompts) < args.generation_batch_size:
        raise InstructGPTError(
            f"train_dataset has {len(prompts)} prompts, fewer than generation_batch_size="
            f"{args.generation_batch_size} episodes of one iteration; add prompts or lower generation_batch_size."
        )
