"""Shared fixtures: everything is tiny, random, local and offline."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

VOCABULARY = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", *[f"w{i}" for i in range(35)]]


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)  # the models are too small for more to help


@pytest.fixture(scope="session")
def tokenizer():
    """Words separated by spaces, 64 of them, with distinct padding and EOS tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def tiny_config(architecture="llama", **changes):
    """A config of a few thousand parameters; sizes are multiples of 32, which 4-bit layers need."""
    from transformers import AutoConfig

    sizes = {
        "llama": dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
        ),
        "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=128),
        "gpt_neox": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
    }[architecture]
    common = dict(vocab_size=len(VOCABULARY), pad_token_id=0, eos_token_id=1, bos_token_id=1)
    return AutoConfig.for_model(architecture, **{**common, **sizes, **changes})


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
