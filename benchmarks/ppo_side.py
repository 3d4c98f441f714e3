"""What the two sides of benchmarks/ppo.py share. Each runs in an environment of its own, so this needs only torch and
transformers.

A side is a process: `python ppo_ours.py JOB` or `PEER_PYTHON ppo_peer.py JOB`, JOB a file with a `Job`. It builds its
trainer, starts `train()`, and stops inside it after every iteration until it reads a line, so that iterations of the
two sides can take turns. What it finds goes to its standard output, one line of JSON for each iteration.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from process import PeakMemory
from transformers import TrainerCallback

# Far below every logit: the probability is 0, and no infinity enters the arithmetic.
NEVER = -1e4
POLICY, SCALAR = "policy", "scalar"
# What weights are loaded in; mixed computes in bfloat16 on float32 weights, by autocast.
WEIGHTS = {"float32": torch.float32, "mixed": torch.float32, "bfloat16": torch.bfloat16}
# As many iterations as anyone could ask for; the parent process ends the training.
ITERATIONS = 1000
# What both trainers are told of the algorithm (InstructGPT C.4 and this package's defaults).
CLIP, VALUE_CLIP, VALUE_WEIGHT = 0.2, 0.2, 0.1


@dataclass(frozen=True)
class Job:
    """One side's work.

    Attributes:
        folder: holds the models `policy` and `scalar` (reward model and start of the value model).
        train: full, lora or qlora.
        dtype: a key of `WEIGHTS`.
        cuda: on a GPU.
        threads: of torch.
        prompts: token ids.
        episodes: of an iteration, each with a prompt of its own.
        minibatch: episodes of an optimizer step.
        micro_batch: episodes of a forward and backward pass.
        completion: most tokens of a completion.
        rollout_batch: episodes of a forward pass without gradient.
        biases: by token id, added to the policy's logits.
        learning_rate: of policy and value model.
        lam: lambda of the advantages.
        beta: coefficient of the KL penalty.
        seed: of the order of the prompts and of what is sampled.
        gradient_checkpointing: whether activations are computed again instead of kept.
        samples: whether prompts and completions are reported too.
        completions: what the policy answers, instead of sampling: then nothing is timed, and the two steps of two
            inner epochs are written to `record`.
        record: file for what is compared.
    """

    folder: str
    train: str
    dtype: str
    cuda: bool
    threads: int
    prompts: list[list[int]]
    episodes: int
    minibatch: int
    micro_batch: int
    completion: int
    rollout_batch: int
    biases: dict[str, float]
    learning_rate: float = 1e-6
    lam: float = 0.95
    beta: float = 0.02
    seed: int = 0
    gradient_checkpointing: bool = False
    samples: bool = False
    completions: list[list[int]] | None = None
    record: str | None = None

    @property
    def checks(self) -> bool:
        """Whether stored completions are computed instead of timed."""
        return self.completions is not None

    @property
    def steps(self) -> int:
        """Optimizer steps of an iteration, with one inner epoch."""
        return self.episodes // self.minibatch

    @property
    def accumulation(self) -> int:
        """Forward and backward passes of an optimizer step."""
        return self.minibatch // self.micro_batch

    @property
    def model_options(self) -> dict[str, Any]:
        """For every `from_pretrained`."""
        return model_options(self.train, self.dtype, self.cuda)


def model_options(train: str, dtype: str, cuda: bool) -> dict[str, Any]:
    """What a model is loaded with, as the keyword arguments of `from_pretrained`."""
    options: dict[str, Any] = {"dtype": WEIGHTS[dtype]}
    if train == "qlora":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
        )
    if cuda:
        options["device_map"] = {"": "cuda:0"}
    return options


def training_settings(job: Job, folder: str) -> dict[str, Any]:
    """What both trainers' configurations have in common. Neither clips gradients, because the peer cannot.

    The compared steps are those of plain gradient descent: Adam's first step has the size of the learning rate
    wherever the gradient is not 0, and would carry rounding errors of the smallest gradients into the second one.
    """
    return {
        "output_dir": folder,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "sgd" if job.checks else "adamw_torch_fused",
        "adam_beta2": 0.95,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": job.micro_batch,
        "temperature": 1.0,
        "gamma": 1.0,
        "lam": job.lam,
        "vf_coef": VALUE_WEIGHT,
        "cliprange_value": VALUE_CLIP,
        "gradient_checkpointing": job.gradient_checkpointing,
        "bf16": job.dtype != "float32",
        "use_cpu": not job.cuda,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": job.seed,
    }


def set_biases(model: Any, biases: dict[str, float]) -> Any:
    """Give a causal model's unembedding a frozen bias: how likely EOS is sets the lengths of its answers."""
    if not biases:
        return model
    head = model.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0], dtype=head.weight.dtype, device=head.weight.device)
    for token, value in biases.items():
        bias[int(token)] = value
    head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return model


@torch.no_grad()
def move_policy(parameters: Iterable[Any], train: str) -> None:
    """Scale what is trained of the policy, so that it differs from the reference it was copied to by a few nats."""
    for parameter in parameters:
        parameter.mul_(1.02 if train == "full" else 1.5)


def gradients(roles: dict[str, dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Gradients by role and by names that do not depend on who wrapped the model.

    Args:
        roles: under `policy` and `value_model` the parameters that are trained, by name.
    """
    found = {}
    for role, parameters in roles.items():
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                found[f"{role}.{plain_name(name)}"] = parameter.grad.detach().float().cpu().clone()
    return found


def plain_name(name: str) -> str:
    """A parameter's name without roles, the wrappers of PEFT, and the names of adapters."""
    wrappers = ("policy", "value_model", "base_model", "model", "default", "modules_to_save")
    return ".".join(part for part in name.split(".") if part not in wrappers)


class Turns(TrainerCallback):
    """Holds the training after every iteration until the parent process asks for the next one.

    Args:
        channel: where findings are written.
        job: the side's work.
        memory: its baseline is what the process held after imports.
        sampled: prompts and completions of the iteration, which are taken out.
    """

    def __init__(
        self, channel: Channel, job: Job, memory: PeakMemory, sampled: list[tuple[list[int], list[int]]]
    ) -> None:
        self.channel = channel
        self.job = job
        self.memory = memory
        self.sampled = sampled
        self.started = self.processor_started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The models are loaded; wait."""
        self.channel.write({"held_mib": self.memory.held_mib(), "loading_mib": self.memory.peak_mib()})
        self._wait()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Both trainers log once, at the end of an iteration: report and wait."""
        seconds, processor_seconds = self._now() - self.started, time.process_time() - self.processor_started
        found = {
            "seconds": seconds,
            "processor_seconds": processor_seconds,
            "peak_mib": self.memory.peak_mib(),
            "held_mib": self.memory.held_mib(),
            "mean_length": sum(len(completion) for _, completion in self.sampled) / len(self.sampled),
            "score": logs["objective/scores"],
            "kl": logs["objective/kl"],
        }
        if len(self.sampled) != self.job.episodes:
            raise RuntimeError(f"{len(self.sampled)} episodes in an iteration of {self.job.episodes}")
        if self.job.samples:
            found["samples"] = list(self.sampled)
        self.sampled.clear()
        self.channel.write(found)
        self._wait()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)  # the parent has what it wants
        self.memory.reset()
        self.processor_started = time.process_time()
        self.started = self._now()

    def _now(self) -> float:
        if self.memory.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


class Channel:
    """The process's standard output, for lines of JSON only: whatever else is printed goes to standard error."""

    def __init__(self) -> None:
        self.file = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def write(self, found: dict[str, Any]) -> None:
        """One line."""
        self.file.write(json.dumps(found) + "\n")
        self.file.flush()


def read_job(path: str) -> Job:
    """The job in a file; sets the number of threads."""
    job = Job(**json.loads(Path(path).read_text(encoding="utf-8")))
    torch.set_num_threads(job.threads)
    return job
