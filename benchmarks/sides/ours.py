"""This package's side of benchmarks/ppo.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from instructgpt_hf._compat.quirks import quiet_environment
from instructgpt_hf.config.ppo import PPOConfig
from instructgpt_hf.models.loading import load_policy, load_tokenizer
from instructgpt_hf.models.shared_base import load_scorers
from instructgpt_hf.trainers.ppo import reference
from instructgpt_hf.trainers.ppo.trainer import PPOTrainer
from sides.job import CLIP, ITERATIONS, POLICY, SCALAR, Job, set_biases
from sides.side import Samples, Side, gradients, move_policy, record


class Ours(Side):
    """`instructgpt_hf.PPOTrainer`."""

    scalars = ("objective/kl", "loss/policy", "loss/value")

    def build(self, job: Job, folder: str) -> PPOTrainer:
        root = Path(job.folder)
        tokenizer = load_tokenizer(root / POLICY)
        policy = load_policy(root / POLICY, tokenizer, **job.model_options)
        set_biases(policy, job.biases)
        reward_model, value_model = load_scorers(policy, root / SCALAR, **job.model_options)
        trainer = PPOTrainer(
            policy,
            reward_model,
            args=_config(job, folder),
            value_model=value_model,
            train_dataset=Dataset.from_list([{"prompt": _as_text(prompt)} for prompt in job.prompts]),
            processing_class=tokenizer,
            prompt_format=Ids(),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def keep_samples(self, trainer: PPOTrainer) -> list[Samples]:
        return record(trainer, "generate", lambda _, result: list(zip(result[0], result[1], strict=True)))

    def train_on_stored(self, trainer: PPOTrainer, job: Job) -> Any:
        steps = Steps()
        trainer.add_callback(steps)
        move_policy(trainer.actor_critic.role_parameters("policy").values(), job.train)
        numbers = {_as_text(prompt): number for number, prompt in enumerate(job.prompts)}
        order: list[int] = []

        def generate_stored(prompts: list[str]) -> Any:
            found = [numbers[prompt] for prompt in prompts]
            order.extend(found)
            completions = [job.completions[number] for number in found]
            return [trainer.render_prompt(prompt) for prompt in prompts], completions, [""] * len(prompts)

        trainer.generate = generate_stored
        rollouts, scores = (record(trainer, name, lambda _, result: result) for name in ("rollout", "rewards"))
        references = record(reference, "evaluate", lambda _, result: result)
        trainer.train()
        (batch,) = rollouts
        tensors = {name: getattr(batch, name) for name in ("logps", "values", "returns", "advantages")}
        tensors |= {"raw_advantages": batch.returns - batch.values, "scores": scores[0].squeeze(1)}
        return {**tensors, "reference": references[0].ref_logps}, steps.gradients, order


def _config(job: Job, folder: str) -> PPOConfig:
    return PPOConfig(
        **job.training_settings(folder),
        gradient_accumulation_steps=job.accumulation,
        generation_batch_size=job.episodes,
        num_iterations=2 if job.checks else 1,
        max_steps=2 if job.checks else job.steps * ITERATIONS,
        max_completion_length=job.completion,
        max_prompt_length=None,
        per_device_eval_batch_size=job.rollout_batch,
        value_learning_rate=job.learning_rate,
        warmup_iterations=0,
        beta=job.beta,
        epsilon=CLIP,
        policy_loss_reduction="token_mean",  # the peer's
        # Off, because the peer has none of these.
        ptx_coef=0.0,
        ema_decay=0.0,
        rollout_log_samples=0,
    )


class Ids:
    """A prompt format for prompts that are token ids already, written as text."""

    def prompt_ids(self, prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The ids in the text."""
        return [int(item) for item in prompt.split()]

    def completion_text(self, prompt: str, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
        """The ids as text."""
        return _as_text(ids)


def _as_text(ids: list[int]) -> str:
    return " ".join(map(str, ids))


class Steps(TrainerCallback):
    """Keeps the gradients of every step, before the optimizer sees them."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Copy the gradients of both trained models."""
        self.gradients.append(gradients({role: model.role_parameters(role) for role in ("policy", "value_model")}))


if __name__ == "__main__":
    with quiet_environment():
        Ours().main()
