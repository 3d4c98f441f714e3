"""Reward and value model as adapters on one base, the policy's own where they have the same.

With LoRA, four roles need the base's weights once: the policy and its reference are two adapters, reward and value
model two more, each with a scalar head of its own. If the reward model has another base than the policy, such as the
paper's 6B model for a 1.3B policy, reward and value model share that one.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from instructgpt_hf._compat.peft import unwrap_peft
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.models.adapters import POLICY_ADAPTER, REWARD_ADAPTER, VALUE_ADAPTER, adapter_of, using_adapter
from instructgpt_hf.models.loading import adapter_base, is_adapter, resolve_source
from instructgpt_hf.models.reward_model import (
    BASE_QUANTIZATION,
    CLASSIFIER_FOLDER,
    HEAD,
    ScoreHead,
    classifier_record,
    load_adapter_classifier,
    load_classifier_config,
    load_reward_model,
)

# PEFT's names of a classifier's head.
_HEADS = {HEAD, "classifier"}
# What must agree between two quantised bases for one to stand in for the other.
_QUANTIZATION = (
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype",
    "llm_int8_threshold",
)


class AdapterScorer(nn.Module):
    """A scalar score for every token from one adapter of a PEFT model and a head: a reward or value model.

    It answers what the rest of the package asks of a sequence classifier: `config`, the head `score`, and the backbone
    under `base_model_prefix`. `parameters()` are its adapter's and its head's only, whatever else shares the base.

    Args:
        host: PEFT model that holds the base and the adapter.
        adapter: its name; None uses the base alone.
        head: [1, d] linear layer.
        config: of the sequence classifier, with `reward_shift`.
        owns_host: register the host's weights as this module's; False where another module has them.
    """

    base_model_prefix = "backbone"

    def __init__(self, host: PeftModel, adapter: str | None, head: nn.Linear, config: Any, owns_host: bool) -> None:
        super().__init__()
        self.score = head
        self.adapter = adapter
        self.config = config
        if owns_host:
            self.host = host
        else:
            self.__dict__["host"] = host

    def backbone(self, **inputs: Any) -> Any:
        """The base's final hidden states [B, S, d] under this adapter."""
        inner = unwrap_peft(self.host)
        with using_adapter(self.host, self.adapter), self._own_mode():
            return getattr(inner, inner.base_model_prefix)(**inputs)

    @contextlib.contextmanager
    def _own_mode(self) -> Iterator[None]:
        """Without dropout in a frozen role while the host, whose dropout it is, is in training."""
        if self.training or not self.host.training:
            yield
            return
        self.host.eval()
        try:
            yield
        finally:
            self.host.train()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Raw scores [B, S] at every position, without the shift."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        scores: Tensor = self.score(hidden).squeeze(-1)
        return scores

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """This role's own: its adapter and its head."""
        yield from self.score.named_parameters(prefix=HEAD)
        for name, parameter in self.host.named_parameters():
            if self.adapter is not None and adapter_of(name) == self.adapter:
                yield name, parameter

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter as `save_reward_model` does, for `load_reward_model` and plain transformers."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        adapter = self.adapter or POLICY_ADAPTER
        weights = get_peft_model_state_dict(self.host, adapter_name=adapter, save_embedding_layers=False)
        weights[f"base_model.model.{HEAD}.weight"] = self.score.weight
        tensors = {name: item.detach().cpu().contiguous() for name, item in weights.items()}
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config = copy.deepcopy(self.host.peft_config[adapter])
        config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", [HEAD], True
        config.save_pretrained(str(folder))
        self.config.save_pretrained(folder / CLASSIFIER_FOLDER)


def load_scorers(
    policy: Any, folder: str | Path, *, peft_config: LoraConfig | None = None, **model_kwargs: Any
) -> tuple[Any, Any]:
    """The frozen reward model, and the value model that starts as its copy (InstructGPT §3.5).

    Args:
        policy: of the same run; a PEFT model's base is shared where the reward model's adapter was trained on it.
        folder: reward model, whole or adapter.
        peft_config: of the value model's adapter, where the reward model is whole.
        model_kwargs: for `from_pretrained`, where another base is loaded.

    Returns:
        Reward model and value model: two adapters of one base, or two whole models without any adapter.

    Raises:
        InstructGPTError: if the folder holds no reward model, or an adapter that does not fit its base.
    """
    folder = Path(folder)
    if is_adapter(folder):
        if isinstance(policy, PeftModel) and sharing_refusal(policy, folder, **model_kwargs) is None:
            return _adapters_on(policy, folder, owns_host=False)
        base = load_adapter_classifier(folder, **model_kwargs)
        return _adapters_on(base, folder, owns_host=True)
    reward = load_reward_model(folder, **model_kwargs)
    if peft_config is None:
        return reward, load_reward_model(folder, trainable=True, **model_kwargs)
    return _adapter_beside_whole(reward, peft_config)


def load_another_reward_model(policy: Any, value_model: Any, folder: str | Path, **model_kwargs: Any) -> Any:
    """A further frozen reward model: an adapter on a base that is in memory already, or else a model of its own.

    Args:
        policy: of the same run.
        value_model: what `load_scorers` gave.
        folder: reward model, whole or adapter.
        model_kwargs: for `from_pretrained`, where another base is loaded.

    Raises:
        InstructGPTError: if the folder holds no reward model, or an adapter that does not fit its base.
    """
    folder = Path(folder)
    if is_adapter(folder) and not (saved := _SavedAdapter(folder)).brings_embeddings:
        for host in (policy, getattr(value_model, "host", None)):
            if isinstance(host, PeftModel) and sharing_refusal(host, folder, **model_kwargs) is None:
                return _another_adapter_on(host, saved)
    return load_reward_model(folder, **model_kwargs)


def sharing_refusal(host: PeftModel, folder: Path, **model_kwargs: Any) -> str | None:
    """Why the adapter in `folder` cannot use the base of the policy, or of another model, or None if it can."""
    own, other = next(iter(host.peft_config.values())), PeftConfig.from_pretrained(folder)
    if not (isinstance(own, LoraConfig) and isinstance(other, LoraConfig)):
        return "only LoRA adapters can share a base"
    if set(other.modules_to_save or ()) - _HEADS or own.modules_to_save:
        return "an adapter brings whole modules of its own"
    source, revision = adapter_base(folder)
    bases = {
        resolve_source(str(own.base_model_name_or_path), own.revision, "base model of the adapter").resolve(),
        resolve_source(source, revision, "base model of the adapter").resolve(),
    }
    if len(bases) > 1:
        return "the adapters have different base models"
    saved, inner = load_classifier_config(folder), unwrap_peft(host)
    quantization = model_kwargs.get("quantization_config", getattr(saved, BASE_QUANTIZATION, None))
    if _quantization(quantization) != _quantization(getattr(inner.config, "quantization_config", None)):
        return "the reward model was trained on a base of another precision"
    if saved.get_text_config().vocab_size > inner.get_input_embeddings().weight.shape[0]:
        return "the reward model's tokenizer has more tokens than the base has embeddings"
    dtype = model_kwargs.get("dtype", saved.dtype)
    if isinstance(dtype, torch.dtype) and dtype != inner.dtype:
        return "the reward model was trained on a base of another precision"
    return None


def _quantization(config: Any) -> dict[str, Any]:
    """What of a quantisation changes results; empty for none."""
    if config is None:
        return {}
    values = config if isinstance(config, dict) else config.to_dict()
    return {name: str(values.get(name)) for name in _QUANTIZATION}


class _SavedAdapter:
    """The adapter of a reward model as its folder has it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = PeftConfig.from_pretrained(folder)
        self.config.modules_to_save, self.config.inference_mode = None, False
        self.record = load_classifier_config(folder)
        self.weights = load_peft_weights(str(folder), device="cpu")
        self.head = self.weights.pop(f"base_model.model.{HEAD}.weight")

    @property
    def brings_embeddings(self) -> bool:
        """Whether it was saved with embeddings that had grown for tokens of its own."""
        return any("lora_" not in key for key in self.weights)

    def put_on(self, host: Any, name: str) -> PeftModel:
        """Add it to a model, or PEFT model, under a name."""
        config = copy.deepcopy(self.config)
        if isinstance(host, PeftModel):
            config.task_type = next(iter(host.peft_config.values())).task_type
            host.add_adapter(name, config)
        else:
            config.task_type = None
            host = get_peft_model(host, config, adapter_name=name)
        _fill(host, name, self.weights, self.folder)
        return host

    def scorer(self, host: PeftModel, name: str, owns_host: bool = False) -> AdapterScorer:
        """The role that applies it, with a copy of its head."""
        head = _head(self.head, next(unwrap_peft(host).parameters()).device)
        return AdapterScorer(host, name, head, copy.deepcopy(self.record), owns_host)


def _adapters_on(base: Any, folder: Path, owns_host: bool) -> tuple[AdapterScorer, AdapterScorer]:
    """The reward adapter of `folder` twice, frozen and trainable, on the policy or on a classifier of its own."""
    saved, host = _SavedAdapter(folder), base
    for name in (VALUE_ADAPTER, REWARD_ADAPTER):
        host = saved.put_on(host, name)
    return _roles(saved.scorer(host, REWARD_ADAPTER), saved.scorer(host, VALUE_ADAPTER, owns_host), host)


def _another_adapter_on(host: PeftModel, saved: _SavedAdapter) -> AdapterScorer:
    """A saved reward adapter, frozen, beside the adapters that the host has."""
    trained = {name: item.requires_grad for name, item in host.named_parameters()}
    name = next(new for number in count(2) if (new := f"{REWARD_ADAPTER}_{number}") not in host.peft_config)
    saved.put_on(host, name)
    # PEFT 0.20 freezes every adapter that is not the active one when it adds another.
    for parameter, item in host.named_parameters():
        item.requires_grad_(trained.get(parameter, False))
    scorer = saved.scorer(host, name)
    scorer.requires_grad_(False)
    return scorer.eval()


def _fill(host: PeftModel, name: str, weights: dict[str, Tensor], folder: Path) -> None:
    """Copy saved weights into one adapter; embeddings that PEFT saved because they grew are the base's."""
    own = {key: item for key, item in weights.items() if "lora_" in key}
    found = set_peft_model_state_dict(host, own, adapter_name=name)
    wanted = get_peft_model_state_dict(host, adapter_name=name, save_embedding_layers=False)
    if found.unexpected_keys or set(wanted) != set(own):
        key = next(iter(found.unexpected_keys or set(wanted) ^ set(own)))
        raise InstructGPTError(f"{folder}: the adapter does not fit its base model: {key}")


def _adapter_beside_whole(reward: Any, peft_config: LoraConfig) -> tuple[AdapterScorer, AdapterScorer]:
    """A whole reward model, frozen, and a fresh adapter on it as the value model."""
    own = copy.deepcopy(peft_config)
    own.modules_to_save, own.task_type = None, None
    # "all-linear" would give the head an adapter too, which no score passes through.
    own.exclude_modules = [HEAD]
    weight, record = getattr(reward, HEAD).weight.detach(), classifier_record(reward)
    host = get_peft_model(reward, own, adapter_name=VALUE_ADAPTER)
    scorer = AdapterScorer(host, None, _head(weight, weight.device), record, owns_host=False)
    value = AdapterScorer(host, VALUE_ADAPTER, _head(weight, weight.device), copy.deepcopy(record), owns_host=True)
    return _roles(scorer, value, host)


def _roles(reward: AdapterScorer, value: AdapterScorer, host: PeftModel) -> tuple[AdapterScorer, AdapterScorer]:
    # What the base applies outside a role; PEFT then trains that adapter alone.
    host.set_adapter(POLICY_ADAPTER if POLICY_ADAPTER in host.peft_config else VALUE_ADAPTER)
    reward.requires_grad_(False)
    value.requires_grad_(True)
    return reward.eval(), value


def _head(weight: Tensor, device: torch.device) -> ScoreHead:
    head = ScoreHead(weight.shape[1], 1, bias=False, device=device)
    with torch.no_grad():
        head.weight.copy_(weight)
    return head
