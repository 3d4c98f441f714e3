"""The peer's side of benchmarks/ppo.py: trl.experimental.ppo.PPOTrainer of TRL 1.12.0, in its own environment."""

from __future__ import annotations

import os

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from sides.job import BASE, CLIP, ITERATIONS, POLICY, SCALAR, Job, set_biases
from sides.side import Samples, Side, gradients, move_policy, record

# The reference is the initial policy; with adapters it is a second adapter.
TRAINED, REFERENCE = "default", "reference"


class Peer(Side):
    """`trl.experimental.ppo.PPOTrainer`, whose rollout is made of functions of its module."""

    scalars = ("objective/kl", "loss/policy_avg", "loss/value_avg")

    def build(self, job: Job, folder: str) -> PPOTrainer:
        root = Path(job.folder)
        tokenizer = AutoTokenizer.from_pretrained(root / POLICY, padding_side="left")
        policy = load_policy(job, root)
        policy.generation_config.pad_token_id = tokenizer.pad_token_id
        data = Dataset.from_list([{"input_ids": prompt} for prompt in job.prompts])
        trainer = PPOTrainer(
            args=_config(job, folder, adapters=isinstance(policy, PeftModel)),
            processing_class=tokenizer,
            model=policy,
            ref_model=None,
            reward_model=load_scalar(job, root, trainable=False),
            value_model=load_scalar(job, root, trainable=True),
            train_dataset=data,
            eval_dataset=data,
        )
        # Without the first line all minibatches are accumulated into one optimizer step; without the second the last
        # batch of a pass over the prompts steps after every micro-batch. Both lines give the configured steps.
        trainer.accelerator.gradient_accumulation_steps = job.accumulation
        trainer.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
        trainer.remove_callback(PrinterCallback)
        return trainer

    def keep_samples(self, trainer: PPOTrainer) -> list[Samples]:
        return record(ppo_trainer, "batch_generation", _samples)

    def train_on_stored(self, trainer: PPOTrainer, job: Job) -> Any:
        move_policy((item for item in trainer.policy_model.parameters() if item.requires_grad), job.train)
        stored = StoredCompletions(job, trainer.processing_class.pad_token_id)
        ppo_trainer.batch_generation = stored
        log_softmax, rewards, whitened = (
            record(ppo_trainer, name, lambda *call: call)
            for name in ("selective_log_softmax", "get_reward", "masked_whiten")
        )
        steps = record(trainer.optimizer, "step", lambda *_: gradients(_by_role(trainer.model)))
        trainer.train()
        (raw, mask), advantages = whitened[0]
        values = rewards[0][1][0][:, -mask.shape[1] - 1 : -1].squeeze(-1)
        tensors = {
            "logps": log_softmax[0][1] * mask,
            "reference": log_softmax[1][1] * mask,
            "values": values * mask,
            "raw_advantages": raw * mask,
            "returns": (raw + values) * mask,
            "advantages": advantages * mask,
            "scores": rewards[1][1][1],
        }
        return tensors, steps, stored.order


def _config(job: Job, folder: str, adapters: bool) -> PPOConfig:
    return PPOConfig(
        **job.training_settings(folder),
        gradient_accumulation_steps=job.episodes // job.micro_batch,
        num_mini_batches=job.steps,
        num_ppo_epochs=2 if job.checks else 1,
        total_episodes=job.episodes * (1 if job.checks else ITERATIONS),
        response_length=job.completion,
        stop_token="eos",
        num_sample_generations=0,
        kl_coef=job.beta,
        kl_estimator="k1",
        cliprange=CLIP,
        local_rollout_forward_batch_size=job.rollout_batch,
        model_adapter_name=TRAINED if adapters else None,
        ref_adapter_name=REFERENCE if adapters else None,
    )


def load_policy(job: Job, root: Path) -> PreTrainedModel | PeftModel:
    """The policy; with adapters, its frozen copy on the same base is the reference."""
    source = root / POLICY
    base = AutoModelForCausalLM.from_pretrained(source if job.train == "full" else root / BASE, **job.model_options)
    set_biases(base, job.biases)
    if job.train == "full":
        return base
    policy = PeftModel.from_pretrained(base, source, adapter_name=TRAINED, is_trainable=True)
    policy.load_adapter(source, adapter_name=REFERENCE)
    policy.set_adapter(TRAINED)
    return policy


def load_scalar(job: Job, root: Path, trainable: bool) -> PreTrainedModel:
    """Reward or value model. An adapter's layers stay in the classifier, because TRL looks for its backbone."""
    source, options = root / SCALAR, job.model_options
    if job.train == "full":
        model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, **options)
        return model.requires_grad_(trainable)
    if "quantization_config" in options:
        options["quantization_config"].llm_int8_skip_modules = ["score"]
    base = AutoModelForSequenceClassification.from_pretrained(root / BASE, num_labels=1, **options)
    base.config.pad_token_id = AutoTokenizer.from_pretrained(root / POLICY).pad_token_id
    return PeftModel.from_pretrained(base, source, is_trainable=trainable).get_base_model()


def _samples(arguments: tuple[Any, ...], result: tuple[torch.Tensor, torch.Tensor]) -> Samples:
    """Prompts and completions of a call of TRL's `batch_generation`, without padding."""
    model, queries, _, pad, _ = arguments
    eos = model.generation_config.eos_token_id
    samples = []
    for query, ids in zip(queries.tolist(), result[0][:, queries.shape[1] :].tolist(), strict=True):
        length = ids.index(eos) + 1 if eos in ids else len(ids)
        samples.append(([token for token in query if token != pad], ids[:length]))
    return samples


def _by_role(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    roles: dict[str, dict[str, Any]] = {"policy": {}, "value_model": {}}
    for name, parameter in model.named_parameters():
        roles[name.split(".")[0]][name] = parameter
    return roles


class StoredCompletions:
    """Replaces TRL's sampling: the stored completions, and the policy's logits on them.

    Attributes:
        order: numbers of the completions in the order of the calls' rows.
    """

    def __init__(self, job: Job, pad: int) -> None:
        rows = zip(job.prompts, job.completions or [], strict=True)
        self.completions = {tuple(prompt): (number, ids) for number, (prompt, ids) in enumerate(rows)}
        self.pad = pad
        self.order: list[int] = []

    def __call__(self, model: Any, queries: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(len(ids) for _, ids in self.completions.values())
        responses = torch.full((queries.shape[0], width), self.pad, device=queries.device)
        for row, query in enumerate(queries.tolist()):
            number, ids = self.completions[tuple(token for token in query if token != self.pad)]
            self.order.append(number)
            responses[row, : len(ids)] = torch.tensor(ids)
        sequences = torch.cat([queries, responses], 1)
        logits = ppo_trainer.forward(model, sequences, self.pad).logits[:, queries.shape[1] - 1 : -1]
        return sequences, logits


if __name__ == "__main__":
    Peer().main()
