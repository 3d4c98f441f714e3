"""Shared fixtures: everything is tiny, random, local and offline."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from helpers.tiny_models import VOCABULARY, tiny_config, word_tokenizer


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)  # the models are too small for more to help


@pytest.fixture(scope="session")
def tokenizer():
    """Words separated by spaces, 64 of them, with distinct padding and EOS tokens."""
    return word_tokenizer(VOCABULARY)


@pytest.fixture
def make_policy():
    """A function that builds a random causal language model."""

    def build(architecture="llama", seed=0, **changes):
        import torch
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes))
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 1
        return model

    return build


@pytest.fixture
def make_scorer():
    """A function that builds a random sequence classifier with a scalar head."""

    def build(architecture="llama", seed=1, **changes):
        import torch
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_config(tiny_config(architecture, num_labels=1, **changes))

    return build
