"""A value model that starts as a copy of the policy, for rewards that no model computes."""

from __future__ import annotations

import copy

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from instructgpt_hf._compat.peft import unwrap_peft
from instructgpt_hf._compat.quirks import take_quantization
from instructgpt_hf.errors import loading_errors
from instructgpt_hf.models.adapters import POLICY_ADAPTER, VALUE_ADAPTER
from instructgpt_hf.models.reward_model import BASE_QUANTIZATION, AdapterScorer, Scorer, init_head, scalar_head


def value_model_of(policy: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> Scorer:
    """A value model with the policy's weights and a fresh head, drawn as that of a reward model.

    Of a PEFT policy it is another adapter on the policy's base, a copy of the policy's.

    Raises:
        InstructGPTError: if the architecture has no sequence classifier with a `score` head.
    """
    base = unwrap_peft(policy)
    config = copy.deepcopy(base.config)
    quantization = take_quantization(config, base)
    config.num_labels, config.reward_shift = 1, 0.0
    text_config = config.get_text_config()
    text_config.vocab_size = base.get_input_embeddings().weight.shape[0]
    text_config.pad_token_id, text_config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    if not isinstance(policy, PeftModel):
        model = _classifier(config, base.device, base.dtype)
        getattr(model, model.base_model_prefix).load_state_dict(getattr(base, base.base_model_prefix).state_dict())
        init_head(model, seed)
        return model
    shape = _classifier(config, torch.device("meta"), torch.float32)
    config.architectures = shape.config.architectures
    if quantization is not None:
        setattr(config, BASE_QUANTIZATION, quantization)
    own = copy.deepcopy(policy.peft_config[POLICY_ADAPTER])
    own.modules_to_save = None
    policy.add_adapter(VALUE_ADAPTER, own)
    weights = get_peft_model_state_dict(policy, adapter_name=POLICY_ADAPTER, save_embedding_layers=False)
    set_peft_model_state_dict(policy, weights, adapter_name=VALUE_ADAPTER)
    value = AdapterScorer(policy, VALUE_ADAPTER, torch.zeros(scalar_head(shape).weight.shape), config)
    init_head(value, seed)
    return value.requires_grad_(True)


def _classifier(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    message = f"{type(config).__name__}: transformers has no sequence classifier for this architecture"
    with loading_errors(message, ValueError), device:
        model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    scalar_head(model)
    model.config.architectures = [type(model).__name__]
    return model
