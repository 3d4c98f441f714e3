"""The work of one side of benchmarks/ppo.py. Runs in both environments, so it needs torch and transformers only."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common.training import model_options, training_settings
from transformers import PreTrainedModel

PEER, OURS = "trl", "ours"
# Model folders of a job: the policy; reward model and start of the value model; with adapters, the base of both.
POLICY, SCALAR, BASE = "policy", "scalar", "base"
# Far below every logit: the probability is 0, and no infinity enters the arithmetic.
NEVER = -1e4
# More iterations than anyone asks for; the parent process ends the training.
ITERATIONS = 1000
# The algorithm's settings on both sides (InstructGPT C.4 and this package's defaults).
CLIP, VALUE_CLIP, VALUE_WEIGHT = 0.2, 0.2, 0.1


@dataclass(frozen=True)
class Job:
    """Models, prompts and settings of one side."""

    folder: str  # holds the models `POLICY` and `SCALAR`, and with adapters `BASE`
    train: str  # full, lora or qlora
    dtype: str  # a key of `common.training.WEIGHTS`
    cuda: bool
    threads: int  # of torch
    prompts: list[list[int]]  # token ids
    episodes: int  # of an iteration, each with a prompt of its own
    minibatch: int  # episodes of an optimizer step
    micro_batch: int  # episodes of a forward and backward pass
    completion: int  # most tokens of a completion
    rollout_batch: int  # episodes of a forward pass without gradient
    biases: dict[str, float]  # by token id, added to the policy's logits
    learning_rate: float = 1e-6  # of policy and value model
    lam: float = 0.95  # lambda of the advantages
    beta: float = 0.02  # coefficient of the KL penalty
    seed: int = 0  # of the order of the prompts and of sampling
    gradient_checkpointing: bool = False
    samples: bool = False  # whether prompts and completions are reported too
    # Stored completions to use instead of sampling. Nothing is timed then, and the two steps of two inner epochs are
    # written to the file `record`.
    completions: list[list[int]] | None = None
    record: str | None = None

    @property
    def checks(self) -> bool:
        """Whether stored completions are compared, instead of timing sampled ones."""
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
        """Keyword arguments of every `from_pretrained`."""
        return model_options(self.train, self.dtype, self.cuda)

    def training_settings(self, folder: str) -> dict[str, Any]:
        """Training arguments of both sides. Neither clips gradients, because the peer cannot.

        The compared steps are those of plain gradient descent: Adam's first step has the size of the learning rate
        wherever the gradient is not 0, and would carry rounding errors of the smallest gradients into the second one.
        """
        return {
            **training_settings(folder, self.cuda),
            "learning_rate": self.learning_rate,
            "optim": "sgd" if self.checks else "adamw_torch_fused",
            "adam_beta2": 0.95,
            "max_grad_norm": 0.0,
            "per_device_train_batch_size": self.micro_batch,
            "temperature": 1.0,
            "gamma": 1.0,
            "lam": self.lam,
            "vf_coef": VALUE_WEIGHT,
            "cliprange_value": VALUE_CLIP,
            "gradient_checkpointing": self.gradient_checkpointing,
            "bf16": self.dtype != "float32",
            "seed": self.seed,
        }

    def write(self, path: Path) -> None:
        """Write the job as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: str) -> Job:
        """The job in a file; sets the number of threads."""
        job = cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        torch.set_num_threads(job.threads)
        return job


def set_biases(model: PreTrainedModel, biases: dict[str, float]) -> PreTrainedModel:
    """Give a causal model's unembedding a frozen bias: the probability of EOS sets the lengths of completions."""
    if biases:
        head = model.get_output_embeddings()
        bias = torch.zeros(head.weight.shape[0], dtype=head.weight.dtype, device=head.weight.device)
        for token, value in biases.items():
            bias[int(token)] = value
        head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return model
