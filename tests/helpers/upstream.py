"""Small models and trainers as the libraries themselves make them, for the tests of their behaviour."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

OLD_CHECKPOINTING = pytest.mark.skipif(
    not hasattr(PreTrainedModel, "activation_checkpointing_enable"),
    reason="this version of transformers has the old names of activation checkpointing alone",
)


def caught(function):
    """Messages of the warnings that a call raises."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        function()
    return [str(item.message) for item in found]


def tiny(**sizes):
    from helpers.tiny_models import tiny_config

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config("llama", **sizes))


def quantised(folder):
    """A model in 4 bits, loaded from a file of unquantised weights."""
    tiny(hidden_size=64).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**NF4))
