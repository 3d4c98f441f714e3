"""Reward and value model as adapters with a scalar head each, on one base, which is the policy's where possible.

If the reward model has another base than the policy, such as the paper's 6B model for a 1.3B policy, reward and value
model share that base.
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
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from instructgpt_hf._compat.peft import unwrap_peft
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.models.adapters import POLICY_ADAPTER, REWARD_ADAPTER, VALUE_ADAPTER
from instructgpt_hf.models.loading import adapter_config
from instructgpt_hf.models.origins import adapter_base, is_adapter, resolve_source
from instructgpt_hf.models.reward_model import (
    BASE_QUANTIZATION,
    HEAD,
    HEAD_KEY,
    AdapterScorer,
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
        shared = isinstance(policy, PeftModel) and not sharing_refusal(*base_of(policy), folder, **model_kwargs)
        return _adapters_on(policy if shared else load_adapter_classifier(folder, **model_kwargs), folder)
    reward = load_reward_model(folder, **model_kwargs)
    if peft_config is None:
        return reward, load_reward_model(folder, trainable=True, **model_kwargs)
    return adapter_beside_whole(reward, peft_config)


def load_another_reward_model(
    policy: PreTrainedModel | PeftModel, value_model: Scorer, folder: str | Path, **model_kwargs: Any
) -> Scorer:
    """Load a further frozen reward model, as an adapter on the base of `policy` or `value_model` if possible.

    The other arguments and the errors are those of `load_scorers`, which made the value model.
    """
    folder = Path(folder)
    if is_adapter(folder) and not (saved := _SavedAdapter(folder)).brings_embeddings:
        for host in (policy, getattr(value_model, "host", None)):
            if isinstance(host, PeftModel) and sharing_refusal(*base_of(host), folder, **model_kwargs) is None:
                names = (f"{REWARD_ADAPTER}_{number}" for number in count(2))
                name = next(name for name in names if name not in host.peft_config)
                saved.put_on(host, name)
                return AdapterScorer(host, name, saved.head, saved.record).requires_grad_(False).eval()
    return load_reward_model(folder, **model_kwargs)


def base_of(model: PeftModel) -> tuple[PeftConfig, PreTrainedConfig]:
    """The configs of an adapter and of the base of a PEFT model in memory, for `sharing_refusal`."""
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
    held = resolve_source(str(own.base_model_name_or_path), own.revision, "base model of the adapter")
    if held.resolve() != adapter_base(folder).resolve():
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
    values = config if isinstance(config, dict | None) else config.to_dict()
    return {} if values is None else {name: str(values.get(name)) for name in _QUANTIZATION}


class _SavedAdapter:
    """The adapter of a reward model, read from its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = adapter_config(folder)
        self.config.modules_to_save, self.config.inference_mode = None, False
        self.record = load_classifier_config(folder)
        weights = load_peft_weights(str(folder), device="cpu")
        self.head = weights.pop(HEAD_KEY)
        self.weights = {key: item for key, item in weights.items() if "lora_" in key}
        # The embeddings are saved with the adapter where they have grown for further tokens.
        self.brings_embeddings = len(self.weights) < len(weights)

    def put_on(self, host: PreTrainedModel | PeftModel, name: str) -> PeftModel:
        """Add the adapter to a model under a name, without its embeddings, which are the base's.

        Raises:
            InstructGPTError: if the weights are not those of such an adapter.
        """
        config = copy.deepcopy(self.config)
        if isinstance(host, PeftModel):
            config.task_type = next(iter(host.peft_config.values())).task_type
            host.add_adapter(name, config)
        else:
            config.task_type = None
            host = get_peft_model(host, config, adapter_name=name)
        unexpected = set_peft_model_state_dict(host, dict(self.weights), adapter_name=name).unexpected_keys
        wanted = get_peft_model_state_dict(host, adapter_name=name, save_embedding_layers=False)
        if unfit := [*unexpected, *(wanted.keys() ^ self.weights.keys())]:
            raise InstructGPTError(f"{self.folder}: the adapter does not fit its base model: {unfit[0]}")
        return host


def _adapters_on(base: PreTrainedModel | PeftModel, folder: Path) -> tuple[AdapterScorer, AdapterScorer]:
    """Put the reward adapter of `folder` on the policy or on a classifier twice, frozen and trainable."""
    saved, host = _SavedAdapter(folder), base
    for name in (VALUE_ADAPTER, REWARD_ADAPTER):
        host = saved.put_on(host, name)
    reward = AdapterScorer(host, REWARD_ADAPTER, saved.head, saved.record)
    return _roles(reward, AdapterScorer(host, VALUE_ADAPTER, saved.head, saved.record, owns_host=host is not base))


def adapter_beside_whole(reward: PreTrainedModel, peft_config: LoraConfig) -> tuple[AdapterScorer, AdapterScorer]:
    """Freeze a whole reward model, and put a fresh adapter on it as the value model: reward and value model."""
    own = copy.deepcopy(peft_config)
    own.modules_to_save, own.task_type = None, None
    # "all-linear" would give the head an adapter too, which an `AdapterScorer` does not apply.
    own.exclude_modules = [HEAD]
    weight, record = getattr(reward, HEAD).weight.detach(), classifier_record(reward)
    host = get_peft_model(reward, own, adapter_name=VALUE_ADAPTER)
    scorer = AdapterScorer(host, None, weight, record)
    return _roles(scorer, AdapterScorer(host, VALUE_ADAPTER, weight, record, owns_host=True))


def _roles(reward: AdapterScorer, value: AdapterScorer) -> tuple[AdapterScorer, AdapterScorer]:
    """Freeze the reward model, and make its trained copy the value model."""
    adapters = value.host.peft_config
    # The adapter that the base applies outside a role, and the only one that PEFT then trains.
    value.host.set_adapter(POLICY_ADAPTER if POLICY_ADAPTER in adapters else VALUE_ADAPTER)
    reward.requires_grad_(False)
    return reward.eval(), value.requires_grad_(True)
