"""Reward and value model as adapters on one base, which is the policy's base where possible.

With LoRA, four roles need the base's weights once: policy, reference, reward and value model are adapters, the last
two with a scalar head each. If the reward model has another base than the policy, such as the paper's 6B model for a
1.3B policy, reward and value model share that base.
"""

from __future__ import annotations

import copy
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
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from instructgpt_hf._compat.peft import keep_trainable, unwrap_peft
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.models.adapters import POLICY_ADAPTER, REWARD_ADAPTER, VALUE_ADAPTER
from instructgpt_hf.models.loading import adapter_base, is_adapter, resolve_source
from instructgpt_hf.models.reward_model import (
    BASE_QUANTIZATION,
    HEAD,
    AdapterScorer,
    ScoreHead,
    Scorer,
    classifier_record,
    load_adapter_classifier,
    load_classifier_config,
    load_reward_model,
)

# PEFT's names of a classifier's head.
_HEADS = {HEAD, "classifier"}
# Settings in which two quantised bases must agree to have the same weights.
_QUANTIZATION = (
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype",
    "llm_int8_threshold",
)


def load_scorers(
    policy: PreTrainedModel | PeftModel,
    folder: str | Path,
    *,
    peft_config: LoraConfig | None = None,
    **model_kwargs: Any,
) -> tuple[Scorer, Scorer]:
    """Load the frozen reward model, and the value model that starts as its copy (InstructGPT §3.5).

    Args:
        policy: policy of the same run; its base is shared if it is the one that the reward adapter was trained on.
        folder: reward model, whole or adapter.
        peft_config: adapter of the value model if the reward model is whole; None copies the whole model.
        model_kwargs: for `from_pretrained` of another base.

    Returns:
        Reward model and value model: two adapters of one base, or two whole models without any adapter.

    Raises:
        InstructGPTError: if the folder holds no reward model, or an adapter that does not fit its base.
    """
    folder = Path(folder)
    if is_adapter(folder):
        if isinstance(policy, PeftModel) and sharing_refusal(*base_of(policy), folder, **model_kwargs) is None:
            return _adapters_on(policy, folder, owns_host=False)
        base = load_adapter_classifier(folder, **model_kwargs)
        return _adapters_on(base, folder, owns_host=True)
    reward = load_reward_model(folder, **model_kwargs)
    if peft_config is None:
        return reward, load_reward_model(folder, trainable=True, **model_kwargs)
    return _adapter_beside_whole(reward, peft_config)


def load_another_reward_model(
    policy: PreTrainedModel | PeftModel, value_model: Scorer, folder: str | Path, **model_kwargs: Any
) -> Scorer:
    """Load a further frozen reward model, as an adapter on a base in memory if possible.

    Args:
        policy: policy of the same run.
        value_model: value model from `load_scorers`.
        folder: reward model, whole or adapter.
        model_kwargs: for `from_pretrained` of another base.

    Raises:
        InstructGPTError: if the folder holds no reward model, or an adapter that does not fit its base.
    """
    folder = Path(folder)
    if is_adapter(folder) and not (saved := _SavedAdapter(folder)).brings_embeddings:
        for host in (policy, getattr(value_model, "host", None)):
            if isinstance(host, PeftModel) and sharing_refusal(*base_of(host), folder, **model_kwargs) is None:
                return _another_adapter_on(host, saved)
    return load_reward_model(folder, **model_kwargs)


def base_of(model: PeftModel) -> tuple[PeftConfig, PreTrainedConfig]:
    """The configs of a PEFT model in memory as `sharing_refusal` reads them: of an adapter and of the base."""
    base = unwrap_peft(model)
    config = copy.deepcopy(base.config)
    # Weights that were cast, or embeddings that grew, after loading show on the model in memory only.
    config.dtype, config.get_text_config().vocab_size = base.dtype, base.get_input_embeddings().weight.shape[0]
    return next(iter(model.peft_config.values())), config


def sharing_refusal(own: PeftConfig, base: PreTrainedConfig, folder: Path, **model_kwargs: Any) -> str | None:
    """Why a reward adapter cannot use the base of another adapter, or None if it can. Reads configs only.

    Args:
        own: config of an adapter on the base, such as the policy's.
        base: config of the base, with the `dtype`, `quantization_config` and `vocab_size` that it is loaded with.
        folder: reward model, an adapter.
        model_kwargs: for `from_pretrained` of the reward model's own base.
    """
    other = PeftConfig.from_pretrained(folder)
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
    saved = load_classifier_config(folder)
    quantization = model_kwargs.get("quantization_config", getattr(saved, BASE_QUANTIZATION, None))
    if _quantization(quantization) != _quantization(getattr(base, "quantization_config", None)):
        return "the reward model was trained on a base of another precision"
    if saved.get_text_config().vocab_size > base.get_text_config().vocab_size:
        return "the reward model's tokenizer has more tokens than the base has embeddings"
    dtype = model_kwargs.get("dtype", saved.dtype)
    if isinstance(dtype, torch.dtype) and dtype != base.dtype:
        return "the reward model was trained on a base of another precision"
    return None


def _quantization(config: QuantizationConfigMixin | dict[str, Any] | None) -> dict[str, str]:
    """The settings of a quantisation that change results; empty for None."""
    if config is None:
        return {}
    values = config if isinstance(config, dict) else config.to_dict()
    return {name: str(values.get(name)) for name in _QUANTIZATION}


class _SavedAdapter:
    """The adapter of a reward model, read from its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = PeftConfig.from_pretrained(folder)
        self.config.modules_to_save, self.config.inference_mode = None, False
        self.record = load_classifier_config(folder)
        self.weights = load_peft_weights(str(folder), device="cpu")
        self.head = self.weights.pop(f"base_model.model.{HEAD}.weight")

    @property
    def brings_embeddings(self) -> bool:
        """Whether the folder holds embeddings, which had grown for further tokens."""
        return any("lora_" not in key for key in self.weights)

    def put_on(self, host: PreTrainedModel | PeftModel, name: str) -> PeftModel:
        """Add the adapter to a model under a name."""
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
        """A scorer that applies the adapter, with a copy of its head."""
        head = _head(self.head, next(unwrap_peft(host).parameters()).device)
        return AdapterScorer(host, name, head, copy.deepcopy(self.record), owns_host)


def _adapters_on(
    base: PreTrainedModel | PeftModel, folder: Path, owns_host: bool
) -> tuple[AdapterScorer, AdapterScorer]:
    """Put the reward adapter of `folder` on the policy or on a classifier twice, frozen and trainable."""
    saved, host = _SavedAdapter(folder), base
    for name in (VALUE_ADAPTER, REWARD_ADAPTER):
        host = saved.put_on(host, name)
    return _roles(saved.scorer(host, REWARD_ADAPTER), saved.scorer(host, VALUE_ADAPTER, owns_host), host)


def _another_adapter_on(host: PeftModel, saved: _SavedAdapter) -> AdapterScorer:
    """Put a saved reward adapter, frozen, beside the host's adapters."""
    name = next(new for number in count(2) if (new := f"{REWARD_ADAPTER}_{number}") not in host.peft_config)
    with keep_trainable(host):
        saved.put_on(host, name)
    scorer = saved.scorer(host, name)
    scorer.requires_grad_(False)
    return scorer.eval()


def _fill(host: PeftModel, name: str, weights: dict[str, Tensor], folder: Path) -> None:
    """Copy saved weights into one adapter, without the embeddings, which are the base's.

    Raises:
        InstructGPTError: if the weights are not those of the adapter.
    """
    own = {key: item for key, item in weights.items() if "lora_" in key}
    unexpected = set_peft_model_state_dict(host, own, adapter_name=name).unexpected_keys
    wanted = get_peft_model_state_dict(host, adapter_name=name, save_embedding_layers=False)
    if unexpected or set(wanted) != set(own):
        key = next(iter(unexpected or set(wanted) ^ set(own)))
        raise InstructGPTError(f"{folder}: the adapter does not fit its base model: {key}")


def _adapter_beside_whole(reward: PreTrainedModel, peft_config: LoraConfig) -> tuple[AdapterScorer, AdapterScorer]:
    """Freeze a whole reward model, and put a fresh adapter on it as the value model."""
    own = copy.deepcopy(peft_config)
    own.modules_to_save, own.task_type = None, None
    # "all-linear" would give the head an adapter too, which an `AdapterScorer` does not apply.
    own.exclude_modules = [HEAD]
    weight, record = getattr(reward, HEAD).weight.detach(), classifier_record(reward)
    host = get_peft_model(reward, own, adapter_name=VALUE_ADAPTER)
    scorer = AdapterScorer(host, None, _head(weight, weight.device), record, owns_host=False)
    value = AdapterScorer(host, VALUE_ADAPTER, _head(weight, weight.device), copy.deepcopy(record), owns_host=True)
    return _roles(scorer, value, host)


def _roles(reward: AdapterScorer, value: AdapterScorer, host: PeftModel) -> tuple[AdapterScorer, AdapterScorer]:
    # The adapter that the base applies outside a role, and the only one that PEFT then trains.
    host.set_adapter(POLICY_ADAPTER if POLICY_ADAPTER in host.peft_config else VALUE_ADAPTER)
    reward.requires_grad_(False)
    value.requires_grad_(True)
    return reward.eval(), value


def _head(weight: Tensor, device: torch.device) -> ScoreHead:
    head = ScoreHead(weight.shape[1], 1, bias=False, device=device)
    with torch.no_grad():
        head.weight.copy_(weight)
    return head
