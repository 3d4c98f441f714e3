"""This package's side of benchmarks/ppo.py."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from ppo_side import (
    CLIP,
    ITERATIONS,
    POLICY,
    SCALAR,
    Channel,
    Job,
    Turns,
    gradients,
    move_policy,
    read_job,
    set_biases,
    training_settings,
)
from process import PeakMemory
from transformers import PrinterCallback, TrainerCallback

from instructgpt_hf._compat.quirks import quiet_environment
from instructgpt_hf.config.ppo import PPOConfig
from instructgpt_hf.models.loading import load_policy, load_tokenizer
from instructgpt_hf.models.shared_base import load_scorers
from instructgpt_hf.trainers.ppo.trainer import PPOTrainer


class Ids:
    """A prompt format for prompts that are token ids already, written as a text of numbers."""

    def prompt_ids(self, prompt: str, tokenizer: Any) -> list[int]:
        """The ids."""
        return [int(item) for item in prompt.split()]


def build(job: Job, folder: str) -> Any:
    """This package's trainer on the job's models and prompts."""
    root = Path(job.folder)
    tokenizer = load_tokenizer(root / POLICY)
    args = PPOConfig(
        **training_settings(job, folder),
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
        # What the peer does not have.
        ptx_coef=0.0,
        ema_decay=0.0,
        rollout_log_samples=0,
    )
    prompts = [{"prompt": " ".join(map(str, prompt))} for prompt in job.prompts]
    trainer = PPOTrainer(
        **load_models(job, root, tokenizer),
        args=args,
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        prompt_format=Ids(),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def load_models(job: Job, root: Path, tokenizer: Any) -> dict[str, Any]:
    """Policy, reward model and value model, as the package's PPO stage loads them."""
    policy = load_policy(root / POLICY, tokenizer, **job.model_options)
    set_biases(policy, job.biases)
    reward_model, value_model = load_scorers(policy, root / SCALAR, **job.model_options)
    return {"model": policy, "reward_model": reward_model, "value_model": value_model}


def keep_samples(trainer: Any) -> list[tuple[list[int], list[int]]]:
    """A list to which the trainer's prompts and completions are added from now on."""
    found: list[tuple[list[int], list[int]]] = []
    generate = trainer.generate

    def kept(prompts: list[Any]) -> Any:
        prompt_ids, completion_ids, completions = generate(prompts)
        found.extend(zip(prompt_ids, completion_ids, strict=True))
        return prompt_ids, completion_ids, completions

    trainer.generate = kept
    return found


class Steps(TrainerCallback):
    """Keeps the gradients of every step and what is logged."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.metrics: dict[str, float] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Before the optimizer sees them."""
        self.gradients.append(gradients({role: model.role_parameters(role) for role in ("policy", "value_model")}))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """One iteration, then the summary of the run."""
        self.metrics.update(logs)


def check(job: Job, folder: str) -> None:
    """Compute the stored completions, take two steps on them, and write down everything on the way."""
    trainer, steps = build(job, folder), Steps()
    trainer.add_callback(steps)
    move_policy(trainer.actor_critic.role_parameters("policy").values(), job.train)
    answers = {
        " ".join(map(str, p)): (i, c) for i, (p, c) in enumerate(zip(job.prompts, job.completions, strict=True))
    }
    batches, scores, references, order = [], [], [], []
    rollout, reward, evaluate = trainer.rollout, trainer.rewards, trainer._evaluate_policies

    def answer(prompts: list[str]) -> Any:
        order.extend(answers[prompt][0] for prompt in prompts)
        ids = [answers[prompt][1] for prompt in prompts]
        return [trainer.render_prompt(prompt) for prompt in prompts], ids, [""] * len(ids)

    def keep(found: list[Any], function: Any) -> Any:
        def kept(*arguments: Any) -> Any:
            found.append(function(*arguments))
            return found[-1]

        return kept

    trainer.generate = answer
    trainer.rollout, trainer.rewards = keep(batches, rollout), keep(scores, reward)
    trainer._evaluate_policies = keep(references, evaluate)
    trainer.train()
    (batch,), back = batches, torch.tensor(order).argsort()
    found = {name: getattr(batch, name) for name in ("logps", "values", "returns", "advantages")}
    found |= {"raw_advantages": batch.returns - batch.values, "scores": scores[0].squeeze(1)}
    found["reference"] = references[0].ref_logps
    found = {name: item.float().cpu()[back] for name, item in found.items()}
    names = {"kl": "objective/kl", "policy_loss": "loss/policy", "value_loss": "loss/value"}
    scalars = {name: steps.metrics[key] for name, key in names.items()}
    torch.save({"tensors": found, "scalars": scalars, "steps": steps.gradients}, job.record)


def main() -> None:
    """Compare or take turns."""
    channel, job = Channel(), read_job(sys.argv[1])
    memory = PeakMemory(job.cuda)
    memory.start()
    with tempfile.TemporaryDirectory() as folder, quiet_environment():
        if job.checks:
            check(job, folder)
            channel.write({"done": True})
            return
        trainer = build(job, folder)
        trainer.add_callback(Turns(channel, job, memory, keep_samples(trainer)))
        trainer.train()


if __name__ == "__main__":
    main()
