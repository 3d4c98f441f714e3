"""Policy and value model as the one module that the optimizer, DDP, FSDP, DeepSpeed and checkpoints see."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from instructgpt_hf.functional import token_entropy, token_log_probs
from instructgpt_hf.models.loading import unwrap_peft
from instructgpt_hf.models.reward_model import model_inputs, token_scores


class ActorCriticOutput(NamedTuple):
    """What one forward pass over prompts and completions gives, for T completion tokens.

    Attributes:
        logps: [B, T] log-probability of every completion token, at the sampling temperature.
        entropy: [B, T] entropy of the distribution it was drawn from, in nats, or None; without gradient.
        values: [B, T] value before every completion token, or None.
    """

    logps: Tensor
    entropy: Tensor | None
    values: Tensor | None


class ActorCritic(nn.Module):
    """A policy and a value model side by side. They share no weights.

    Args:
        policy: causal language model.
        value_model: sequence classifier with a scalar head, started from the reward model (InstructGPT §3.5).
        temperature: of the rollouts; divides the logits wherever log-probabilities are taken.
    """

    def __init__(self, policy: Any, value_model: Any, temperature: float = 1.0) -> None:
        super().__init__()
        self.policy = policy
        self.value_model = value_model
        self.temperature = temperature

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        completion_length: int | None = None,
        with_entropy: bool = False,
    ) -> ActorCriticOutput | Tensor:
        """One pass; every use goes through here, so that distributed wrappers see it.

        Args:
            input_ids: [B, S], prompts padded left, completions padded right.
            attention_mask: [B, S].
            completion_length: T, the number of last positions that are completions. None gives the policy's plain
                logits [B, S, V], for the pretraining loss.
            with_entropy: also the entropy, for the log.
        """
        if completion_length is None:
            return self.policy(**model_inputs(self.policy, input_ids, attention_mask)).logits
        logps, entropy = completion_log_probs(
            self.policy, input_ids, attention_mask, completion_length, self.temperature, with_entropy
        )
        return ActorCriticOutput(logps, entropy, self.values(input_ids, attention_mask, completion_length))

    def values(self, input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> Tensor:
        """Value [B, T] of the state before each of the last T tokens."""
        return token_scores(self.value_model, input_ids, attention_mask)[:, -completion_length - 1 : -1]

    # What generation and the Trainer ask of "the model" is the policy's to answer.
    @property
    def generation_config(self) -> Any:
        """The policy's generation config; TRL replaces it for the length of a rollout."""
        return self.policy.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self.policy.generation_config = value

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("policy"), name)


def completion_log_probs(
    policy: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_length: int,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the last T tokens of each row.

    The unembedding is applied to the completion's positions only, so no logits of prompt tokens exist.

    Args:
        policy: causal language model, whole or PEFT.
        input_ids: [B, S].
        attention_mask: [B, S]; padding on either side.
        completion_length: T.
        temperature: divides the logits.
        with_entropy: also the entropy of each token's distribution, without gradient.

    Returns:
        logps [B, T] and entropy [B, T] or None, float32; meaningless at padding.
    """
    inputs = model_inputs(policy, input_ids, attention_mask)
    # The logits before the first completion token predict it; those of the last token predict nothing.
    if "logits_to_keep" in inspect.signature(unwrap_peft(policy).forward).parameters:
        logits = policy(**inputs, logits_to_keep=completion_length + 1).logits[:, :-1]
    else:
        logits = policy(**inputs).logits[:, -completion_length - 1 : -1]
    logps = token_log_probs(logits, input_ids[:, -completion_length:], temperature)
    if not with_entropy:
        return logps, None
    with torch.no_grad():
        return logps, token_entropy(logits.detach(), temperature)
