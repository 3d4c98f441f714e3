"""Stage 3: from the SFT and reward models and prompts to the PPO or PPO-ptx policy (InstructGPT §3.5, C.4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from instructgpt_hf.artifacts import VALUE_FOLDER
from instructgpt_hf.config.model import peft_config
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.splits import Split, read_pretraining, read_prompts
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.models.loading import check_adapter_settings, load_policy, load_tokenizer
from instructgpt_hf.models.reward_model import Scorer
from instructgpt_hf.models.scoring import reward_shift
from instructgpt_hf.models.shared_base import load_another_reward_model, load_scorers
from instructgpt_hf.models.value_model import value_model_of
from instructgpt_hf.stages.inputs import (
    FinishedStage,
    check_rollout_lengths,
    model_options,
    model_record,
    previous_stage,
    recorded_format,
)
from instructgpt_hf.stages.reward_sources import Rewards, find_rewards
from instructgpt_hf.stages.stage import Outcome, Stage
from instructgpt_hf.trainers.ppo.functions import check_columns
from instructgpt_hf.trainers.ppo.rewards import Reward
from instructgpt_hf.trainers.ppo.trainer import FRESH_VALUE_MODEL, PPOTrainer

# Prefixes of the logged metrics that stage.json keeps of the last iteration.
LOGGED = ("objective/", "rewards/", "completions/", "val/", "loss/", "policy/")


class PPOInputs(NamedTuple):
    """Models, prompts and texts that stage 3 reads."""

    largest: Path  # folder of the reward model, or of the SFT model where there is none
    sft: FinishedStage
    tokenizer: PreTrainedTokenizerBase
    prompt_format: PromptFormat
    rewards: Rewards
    prompts: Dataset  # within the length limit
    counts: dict[str, int]  # `dropped_too_long` and `longest_tokens` of the prompts
    pretraining: Split | None  # None for plain PPO


class PPOModels(NamedTuple):
    """Loaded models of stage 3."""

    policy: PreTrainedModel | PeftModel
    reward_model: Scorer | None  # the first one
    value_model: Scorer
    rewards: list[Reward]  # in the order of `reward_weights`


class PPOStage(Stage[PPOInputs, Dataset, PPOModels]):
    """PPO against the reward model, with the pretraining gradient of PPO-ptx unless `ptx_coef` is 0."""

    def read(self) -> PPOInputs:
        """The SFT stage, reward models and functions, prompts, and the pretraining text of PPO-ptx."""
        settings = self.run.settings
        data_args, training_args = settings.data_args, settings.training_args
        sft = previous_stage(self.run, data_args.sft_model_path, "sft", data_args.sft_model_revision)
        tokenizer = load_tokenizer(sft.folder)
        prompt_format = recorded_format(sft.record, data_args.prompt_template, tokenizer, "ppo.yaml: prompt_template")
        rewards = find_rewards(self.run, sft.record, prompt_format, tokenizer)
        reward = rewards.models[0] if rewards.models else None
        started = [sft.folder] if rewards.value is None else [sft.folder, rewards.value]
        check_adapter_settings(started, settings.values, "ppo.yaml")
        if rewards.value is None and not training_args.value_warmup_iterations:
            self.run.log(FRESH_VALUE_MODEL)
        if (
            reward is not None
            and settings.reward_stage
            and data_args.reward_model_path is None
            and reward.record.previous["sft"]["fingerprint"] != sft.record.fingerprint
        ):
            raise InstructGPTError(
                f"{reward.folder}: this reward model was trained from an earlier SFT model than the one in "
                f"{sft.folder}. Run the reward stage again, or name the reward model to use with reward_model_path."
            )
        prompts, counts = self._prompts(prompt_format, tokenizer, with_columns=bool(rewards.functions))
        text = read_pretraining(self.sources, data_args, "ptx_coef", training_args.ptx_coef)
        largest = sft.folder if reward is None else reward.folder
        return PPOInputs(largest, sft, tokenizer, prompt_format, rewards, prompts, counts, text)

    def _prompts(
        self, prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase, with_columns: bool
    ) -> tuple[Dataset, dict[str, int]]:
        """The prompts, with the dataset's other columns if reward functions read them, and their counts."""
        data_args, training_args = self.run.settings.data_args, self.run.settings.training_args
        where = f"prompts: {data_args.dataset_name}"
        limit = training_args.max_prompt_length
        parts, counts = read_prompts(self.sources, data_args, prompt_format, tokenizer, limit, with_columns)
        prompts = parts.train
        if with_columns:
            check_columns(prompts.column_names, where)
        if len(prompts) < training_args.generation_batch_size:
            raise InstructGPTError(
                f"{where}: {len(prompts)} prompts, fewer than generation_batch_size = "
                f"{training_args.generation_batch_size} episodes of one iteration; add prompts or lower "
                "generation_batch_size."
            )
        return prompts, counts

    def fingerprints(self, inputs: PPOInputs) -> dict[str, Any]:
        """Fingerprints of the SFT stage, of every reward model and function, and of the value model's start."""
        return {"sft": inputs.sft.record.fingerprint, **inputs.rewards.fingerprints()}

    def prepare(self, inputs: PPOInputs) -> Dataset:
        """The prompts, once every model is known to read the longest of them with the longest completion."""
        training_args = self.run.settings.training_args
        check_rollout_lengths(
            [("policy", inputs.sft.folder), *inputs.rewards.readers()],
            inputs.counts["longest_tokens"],
            training_args.max_completion_length,
            training_args.ptx_max_length if inputs.pretraining is not None else None,
        )
        self.sources.records["prompts"].update(inputs.counts)
        return inputs.prompts

    def load(self, inputs: PPOInputs) -> PPOModels:
        """Policy, reward models and value model, on shared bases where they have the same."""
        settings, rewards = self.run.settings, inputs.rewards
        options = model_options(settings)
        policy = load_policy(
            inputs.sft.folder, inputs.tokenizer, peft_config=peft_config(settings.model_args, "CAUSAL_LM"), **options
        )
        if rewards.value is None:
            value_model = value_model_of(policy, inputs.tokenizer, self.run.seed)
            return PPOModels(policy, None, value_model, list(rewards.functions.values()))
        adapter = peft_config(settings.model_args, "SEQ_CLS")
        loaded: Scorer | None
        loaded, value_model = load_scorers(policy, rewards.value, peft_config=adapter, **options)

        def load_another(folder: Path) -> Scorer:
            return load_another_reward_model(policy, value_model, folder, **options)

        first = rewards.models[0].folder if rewards.models else None
        if rewards.value != first:
            loaded = None if first is None else load_another(first)
        return PPOModels(policy, loaded, value_model, rewards.in_order(loaded, load_another))

    def trainer(self, inputs: PPOInputs, rows: Dataset, models: PPOModels) -> PPOTrainer:
        """The PPO trainer, whose warnings appear in the run's log."""
        trainer = PPOTrainer(
            models.policy,
            models.rewards,
            self.run.settings.training_args,
            value_model=models.value_model,
            train_dataset=rows,
            processing_class=inputs.tokenizer,
            prompt_format=inputs.prompt_format,
            pretraining_dataset=inputs.pretraining.train if inputs.pretraining is not None else None,
        )
        trainer.guard.warn = self.run.log
        return trainer

    def boundary(self) -> int:
        """An iteration: its rollouts are not saved."""
        return self.run.settings.training_args.optimizer_steps_per_iteration

    def conclude(
        self, inputs: PPOInputs, rows: Dataset, models: PPOModels, trainer: PPOTrainer, training: dict[str, Any]
    ) -> Outcome:
        """The last iteration's metrics; policies are measured on held-out prompts by the evaluation."""
        training_args, base = self.run.settings.training_args, inputs.sft.record.base_model
        last = _last_iteration(training["log"])
        record = {
            "prompt_format": inputs.prompt_format.to_dict(),
            "base_model": base,
            "previous": {"sft": inputs.sft.reference, **inputs.rewards.lineage()},
            "model": {
                **model_record(models.policy, base),
                "value_model": VALUE_FOLDER,
                "value_model_architecture": models.value_model.config.architectures[0],
                "published_weights": training_args.publish_weights if training_args.ema_decay else "raw",
                "reward_shift": None if models.reward_model is None else reward_shift(models.reward_model),
                "rewards": inputs.rewards.described(training_args.reward_weights),
            },
            "metrics": last,
        }
        summary = f"last iteration: score {last['objective/scores']:.3f}, KL to SFT {last['objective/kl']:.3f} nats"
        return Outcome(record, trainer.save_pretrained, summary)


def _last_iteration(log: list[dict[str, Any]]) -> dict[str, Any]:
    records = [record for record in log if "objective/scores" in record]
    return {key: value for key, value in records[-1].items() if key.startswith(LOGGED)}
