"""The peer's side of benchmarks/ppo.py: trl.experimental.ppo.PPOTrainer of TRL 1.12.0, in its own environment."""

from __future__ import annotations

import os

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
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
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

# The reference is the policy as it starts, which for an adapter is a second adapter.
TRAINED, REFERENCE = "default", "reference"


def build(job: Job, folder: str, callbacks: list[Any]) -> Any:
    """TRL's trainer on the job's models and prompts."""
    root = Path(job.folder)
    tokenizer = AutoTokenizer.from_pretrained(root / POLICY, padding_side="left")
    policy = load_policy(job, root)
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    adapters = isinstance(policy, PeftModel)
    epochs = 2 if job.checks else 1
    args = PPOConfig(
        **training_settings(job, folder),
        gradient_accumulation_steps=job.episodes // job.micro_batch,
        num_mini_batches=job.steps,
        num_ppo_epochs=epochs,
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
    data = Dataset.from_list([{"input_ids": prompt} for prompt in job.prompts])
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=load_scalar(job, root, trainable=False),
        value_model=load_scalar(job, root, trainable=True),
        train_dataset=data,
        eval_dataset=data,
        callbacks=callbacks,
    )
    # Without the first line all minibatches are accumulated into one optimizer step; without the second the last
    # batch of a pass over the prompts steps after every micro-batch. With both it takes the steps it is told to.
    trainer.accelerator.gradient_accumulation_steps = job.accumulation
    trainer.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
    trainer.remove_callback(PrinterCallback)
    return trainer


def load_policy(job: Job, root: Path) -> Any:
    """The policy; of an adapter, with a frozen copy of it as reference on the same base."""
    source = root / POLICY
    if job.train == "full":
        return set_biases(AutoModelForCausalLM.from_pretrained(source, **job.model_options), job.biases)
    base = set_biases(AutoModelForCausalLM.from_pretrained(root / "base", **job.model_options), job.biases)
    policy = PeftModel.from_pretrained(base, source, adapter_name=TRAINED, is_trainable=True)
    policy.load_adapter(source, adapter_name=REFERENCE)
    policy.set_adapter(TRAINED)
    return policy


def load_scalar(job: Job, root: Path, trainable: bool) -> Any:
    """Reward or value model. An adapter's layers stay in the classifier, whose backbone TRL looks for."""
    source, options = root / SCALAR, job.model_options
    if job.train == "full":
        model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, **options)
        return model.requires_grad_(trainable)
    if "quantization_config" in options:
        options["quantization_config"].llm_int8_skip_modules = ["score"]
    base = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=1, **options)
    base.config.pad_token_id = AutoTokenizer.from_pretrained(root / POLICY).pad_token_id
    return PeftModel.from_pretrained(base, source, is_trainable=trainable).get_base_model()


def keep_samples() -> list[tuple[list[int], list[int]]]:
    """A list to which the prompts and completions that TRL samples are added from now on."""
    found: list[tuple[list[int], list[int]]] = []
    generation = ppo_trainer.batch_generation

    def kept(model: Any, queries: torch.Tensor, size: int, pad_token_id: int, settings: Any) -> Any:
        both, logits = generation(model, queries, size, pad_token_id, settings)
        eos = model.generation_config.eos_token_id
        for query, answer in zip(queries.tolist(), both[:, queries.shape[1] :].tolist(), strict=True):
            length = answer.index(eos) + 1 if eos in answer else len(answer)
            found.append(([token for token in query if token != pad_token_id], answer[:length]))
        return both, logits

    ppo_trainer.batch_generation = kept
    return found


class Recorder:
    """Keeps every result of a function of TRL's module."""

    def __init__(self, name: str) -> None:
        self.function = getattr(ppo_trainer, name)
        self.calls: list[tuple[Any, Any]] = []
        setattr(ppo_trainer, name, self)

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        result = self.function(*arguments, **settings)
        self.calls.append((arguments, result))
        return result


class Answers:
    """Answers prompts with the stored completions, and gives the policy's logits on them as sampling does."""

    def __init__(self, job: Job, pad: int) -> None:
        rows = zip(job.prompts, job.completions or [], strict=True)
        self.answers = {tuple(prompt): (index, answer) for index, (prompt, answer) in enumerate(rows)}
        self.pad = pad
        self.order: list[int] = []
        ppo_trainer.batch_generation = self

    def __call__(self, model: Any, queries: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(len(answer) for _, answer in self.answers.values())
        responses = torch.full((queries.shape[0], width), self.pad, device=queries.device)
        for row, query in enumerate(queries.tolist()):
            index, answer = self.answers[tuple(token for token in query if token != self.pad)]
            self.order.append(index)
            responses[row, : len(answer)] = torch.tensor(answer)
        both = torch.cat([queries, responses], 1)
        logits = ppo_trainer.forward(model, both, self.pad).logits[:, queries.shape[1] - 1 : -1]
        return both, logits


class Metrics(TrainerCallback):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """One iteration."""
        self.found.update(logs)


def check(job: Job, folder: str) -> None:
    """Compute the stored completions, take two steps on them, and write down everything on the way."""
    metrics, steps = Metrics(), []
    trainer = build(job, folder, [metrics])
    pad = trainer.processing_class.pad_token_id
    move_policy((item for item in trainer.policy_model.parameters() if item.requires_grad), job.train)
    answers = Answers(job, pad)
    log_softmax, rewards, whitened = (
        Recorder(name) for name in ("selective_log_softmax", "get_reward", "masked_whiten")
    )
    step = trainer.optimizer.step

    def keep(*arguments: Any, **settings: Any) -> Any:
        roles: dict[str, dict[str, Any]] = {"policy": {}, "value_model": {}}
        for name, parameter in trainer.model.named_parameters():
            roles[name.split(".")[0]][name] = parameter
        steps.append(gradients(roles))
        return step(*arguments, **settings)

    trainer.optimizer.step = keep
    trainer.train()
    (raw, mask), advantages = whitened.calls[0]
    values = rewards.calls[0][1][0][:, -mask.shape[1] - 1 : -1].squeeze(-1)
    back = torch.tensor(answers.order).argsort()
    found = {
        "logps": log_softmax.calls[0][1] * mask,
        "reference": log_softmax.calls[1][1] * mask,
        "values": values * mask,
        "raw_advantages": raw * mask,
        "returns": (raw + values) * mask,
        "advantages": advantages * mask,
        "scores": rewards.calls[1][1][1],
    }
    found = {name: item.float().cpu()[back] for name, item in found.items()}
    names = {"kl": "objective/kl", "policy_loss": "loss/policy_avg", "value_loss": "loss/value_avg"}
    scalars = {name: metrics.found[key] for name, key in names.items()}
    torch.save({"tensors": found, "scalars": scalars, "steps": steps}, job.record)


def main() -> None:
    """Compare or take turns."""
    channel, job = Channel(), read_job(sys.argv[1])
    memory = PeakMemory(job.cuda)
    memory.start()
    with tempfile.TemporaryDirectory() as folder:
        if job.checks:
            check(job, folder)
            channel.write({"done": True})
            return
        build(job, folder, [Turns(channel, job, memory, keep_samples())]).train()


if __name__ == "__main__":
    main()
