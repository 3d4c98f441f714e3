"""Frozen models beside the trained ones, and one pass of policy, value model and KL reference over rollouts."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from instructgpt_hf._compat.peft import REFERENCE_ADAPTER
from instructgpt_hf._compat.quirks import use_own_forward
from instructgpt_hf.config.ppo import PPOConfig
from instructgpt_hf.models.actor_critic import ActorCritic
from instructgpt_hf.models.adapters import using_adapter
from instructgpt_hf.models.loading import keep_half
from instructgpt_hf.trainers.ppo.rollouts import Tokens


class Evaluated(NamedTuple):
    """Log-probabilities under policy and KL reference and values before each token: [B, T], 0 outside the mask."""

    logps: Tensor
    values: Tensor
    ref_logps: Tensor


@torch.no_grad()
def evaluate(
    tokens: Tokens, model: ActorCritic, ref_model: PreTrainedModel | None, batch_size: int, accelerator: Accelerator
) -> Evaluated:
    """Run policy, value model and reference over prompts and completions, `batch_size` rows at a time."""
    shape = tokens.completion_ids.shape
    result = Evaluated(*(torch.zeros(shape, device=accelerator.device) for _ in Evaluated._fields))
    for rows, piece in tokens.by_length(batch_size):
        ids, mask, length = piece.joined()
        with accelerator.autocast():
            output = model(ids, mask, length)
            ref_logps = reference_log_probs(model, ref_model, ids, mask, length)
        for target, values in zip(result, (output.logps, output.values, ref_logps), strict=True):
            target[rows, :length] = (values * piece.completion_mask).to(target.dtype)
    return result


def reference_log_probs(
    model: ActorCritic, ref_model: PreTrainedModel | None, ids: Tensor, mask: Tensor, length: int
) -> Tensor:
    """Log-probabilities [B, T] under the KL reference: `ref_model`, or the policy with the adapter "ref"."""
    if ref_model is not None:
        return model.log_probs(ref_model, ids, mask, length)[0]
    with using_adapter(model.policy, REFERENCE_ADAPTER):
        return model.log_probs(model.policy, ids, mask, length)[0]


@contextlib.contextmanager
def no_second_reference(args: PPOConfig) -> Iterator[None]:
    """Set `beta` to 0 inside the block, so that the constructor of RLOOTrainer loads no reference from disk.

    Ours is a copy of the policy, or the adapter "ref" that RLOOTrainer adds to a PEFT policy.
    """
    beta, args.beta = args.beta, 0.0
    try:
        yield
    finally:
        args.beta = beta


def reference_of(policy: PreTrainedModel | PeftModel, ref_model: PreTrainedModel | None) -> PreTrainedModel | None:
    """The KL reference: the model given, or a copy of the policy; None where the adapter "ref" of a PEFT policy is it.

    Also gives policy and reference their own `forward` back, which another trainer may have replaced.
    """
    use_own_forward(policy)
    if ref_model is None and not hasattr(policy, "peft_config"):
        ref_model = copy.deepcopy(policy)
    if ref_model is not None:
        use_own_forward(ref_model)
    return ref_model


def frozen(model: nn.Module, args: PPOConfig, accelerator: Accelerator) -> nn.Module:
    """Freeze a model, keep its weights in the half precision that it computes in, and place it on the device."""
    model.requires_grad_(False)
    if args.bf16 or args.fp16:
        keep_half(model, torch.bfloat16 if args.bf16 else torch.float16)
    return accelerator.prepare_model(model.eval(), evaluation_mode=True)


def freeze_reference_adapter(policy: PreTrainedModel | PeftModel) -> None:
    """Freeze the adapter "ref" that TRL adds to a PEFT policy, as an exact copy of the policy's start."""
    for name, parameter in policy.named_parameters():
        if f".{REFERENCE_ADAPTER}." in name:
            parameter.requires_grad_(False)
            # Of a quantised model, TRL may have rounded the copy.
            parameter.data = policy.get_parameter(name.replace(f".{REFERENCE_ADAPTER}.", ".default.")).data.clone()
