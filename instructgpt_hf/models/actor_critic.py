"""Policy and value model as the one module that the optimizer, DDP, FSDP, DeepSpeed and checkpoints see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from instructgpt_hf._compat.peft import unwrap_peft
from instructgpt_hf._compat.quirks import enable_checkpointing
from instructgpt_hf.functional import lm_loss, log_probs_and_entropy, token_log_probs
from instructgpt_hf.models.adapters import VALUE_ADAPTER, adapter_of, recompute_with_same_adapter
from instructgpt_hf.models.decoding import generate
from instructgpt_hf.models.inputs import model_inputs
from instructgpt_hf.models.reward_model import Scorer
from instructgpt_hf.models.scoring import token_scores
from instructgpt_hf.models.unpadding import Completions, completion_logits
from instructgpt_hf.models.vocabulary import Vocabulary


class ActorCriticOutput(NamedTuple):
    """Result of one forward pass; None for parts that were not asked for.

    Attributes:
        logps: [B, T] log-probability of each completion token, at the sampling temperature.
        entropy: [B, T] entropy of each token's distribution, in nats; without gradient.
        values: [B, T] value before each completion token.
        lm_loss: [] next-token loss of whole texts, summed over tokens, in nats.
    """

    logps: Tensor | None = None
    entropy: Tensor | None = None
    values: Tensor | None = None
    lm_loss: Tensor | None = None


class ActorCritic(nn.Module):
    """A policy and a value model side by side, without a common trained weight.

    Args:
        policy: causal language model, whole or PEFT.
        value_model: sequence classifier with a scalar head, started from the reward model (InstructGPT §3.5), or an
            `AdapterScorer` on the policy's base.
        temperature: of the rollouts; divides the logits wherever log-probabilities are taken.
        min_length: of the rollouts; EOS has probability 0 in this many first tokens of a completion.
        eos_token_ids: tokens that end a completion.
        vocabulary: of the policy's tokenizer; ids that are no token's have probability 0. None allows every id.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        value_model: Scorer,
        temperature: float = 1.0,
        min_length: int = 0,
        eos_token_ids: Sequence[int] = (),
        vocabulary: Vocabulary | None = None,
    ) -> None:
        super().__init__()
        self.policy, self.value_model, self.temperature = policy, value_model, temperature
        self.min_length, self.eos_token_ids, self.vocabulary = min_length, tuple(eos_token_ids), vocabulary

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        completion_length: int | None = None,
        with_entropy: bool = False,
        role: str | None = None,
        complete: bool = False,
    ) -> ActorCriticOutput:
        """Run the policy, the value model or both; the only entry, so that distributed wrappers see every pass.

        Args:
            input_ids: [B, S], prompts padded left, completions padded right.
            attention_mask: [B, S].
            completion_length: T, the number of last positions that are completions. None asks for `lm_loss` of whole
                texts alone, a scalar, because accelerate widens outputs, and so would logits [B, S, V], to float32.
            with_entropy: also return the entropy, for the log.
            role: `"policy"` or `"value_model"` runs one of them; None runs both.
            complete: give the parameters of the role that does not run a gradient of 0, which distributed wrappers
                wait for.
        """
        if completion_length is None:
            logits = self._allowed(self.policy(**model_inputs(self.policy, input_ids, attention_mask)).logits)
            loss = lm_loss(logits, input_ids, attention_mask, denominator=1.0)
            return ActorCriticOutput(lm_loss=loss + self._zero_of("value_model") if complete else loss)
        logps = entropy = values = None
        complete = complete and role is not None
        if role != "value_model":
            logps, entropy = self.log_probs(self.policy, input_ids, attention_mask, completion_length, with_entropy)
            if complete:
                logps = logps + self._zero_of("value_model")
        if role != "policy":
            values = self.values(input_ids, attention_mask, completion_length)
            if complete:
                values = values + self._zero_of("policy")
        return ActorCriticOutput(logps, entropy, values)

    def log_probs(
        self,
        policy: PreTrainedModel | PeftModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        completion_length: int,
        with_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of the last T tokens of each row, under the distribution of the rollouts.

        Padding costs nothing, and the unembedding is applied to the completions' tokens alone.

        Args:
            policy: this policy or the reference; the other arguments are those of `forward`.

        Returns:
            logps [B, T] and, with `with_entropy`, entropy [B, T] without gradient; float32, 0 at padding.
        """
        batch = Completions.of(input_ids, attention_mask, completion_length)
        logits, ids = self._allowed(completion_logits(policy, batch)), batch.ids[None]
        if self.min_length and self.eos_token_ids:
            early = (batch.steps < self.min_length).nonzero()
            excluded = torch.tensor(self.eos_token_ids, device=logits.device)
            # In place, because a copy would double the memory of the logits.
            logits[0].index_put_((early, excluded), logits.new_tensor(-torch.inf))
        if not with_entropy:
            return batch.spread(token_log_probs(logits, ids, self.temperature)[0]), None
        logps, entropy = log_probs_and_entropy(logits, ids, self.temperature)
        return batch.spread(logps[0]), batch.spread(entropy[0])

    def _allowed(self, logits: Tensor) -> Tensor:
        """Logits [..., V] that are minus infinity for ids that are no token's."""
        return logits if self.vocabulary is None else self.vocabulary.exclude_others(logits)

    def values(self, input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> Tensor:
        """Value [B, T] of the state before each completion token; 0 at padding."""
        batch = Completions.of(input_ids, attention_mask, completion_length)
        scores = token_scores(self.value_model, batch.input_ids, batch.attention_mask)
        return batch.spread(scores[batch.predictors])

    def role_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """Trained parameters of `"policy"` or `"value_model"`, by their names in this module."""
        trained = {name: item for name, item in self.named_parameters() if item.requires_grad}
        # This module and the adapter of the value model have one name.
        is_value = {name: adapter_of(name) == VALUE_ADAPTER for name in trained}
        return {name: item for name, item in trained.items() if is_value[name] == (role == "value_model")}

    def _zero_of(self, role: str) -> Tensor:
        """A scalar 0 that depends on every trained parameter of a role."""
        return 0.0 * torch.cat([item.flatten()[:1].float() for item in self.role_parameters(role).values()]).sum()

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute the activations of both models in the backward pass, each block under its forward pass's adapter.

        Raises:
            ValueError: for reentrant checkpointing of adapters on a shared base, whose gradients would be wrong.
        """
        hosts: list[Any] = [self.policy, getattr(self.value_model, "host", self.value_model)]
        shared = hosts[0] is hosts[1]
        for host in hosts[:1] if shared else hosts:
            settings = dict(activation_checkpointing_kwargs or {"use_reentrant": False})
            if hasattr(host, "peft_config"):
                if not settings.get("use_reentrant", False):
                    settings.update(use_reentrant=False, context_fn=recompute_with_same_adapter(host))
                elif shared:
                    raise ValueError(
                        "gradient_checkpointing_kwargs: use_reentrant=True gives wrong gradients with policy and "
                        "value model as adapters on one base; set use_reentrant to False."
                    )
                host.enable_input_require_grads()
            enable_checkpointing(unwrap_peft(host), settings, **options)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The older name of `activation_checkpointing_enable`, which TRL uses."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def generate(self, **inputs: Any) -> Tensor:
        """Sample the policy's completions; ended ones cost no further decoding steps (see `decoding.generate`)."""
        return generate(self.policy, **inputs)

    # Other attributes that generation and the Trainer read from "the model" are the policy's.
    @property
    def generation_config(self) -> GenerationConfig:
        """The policy's generation config; TRL replaces it for the length of a rollout."""
        return self.policy.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        self.policy.generation_config = value

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("policy"), name)
