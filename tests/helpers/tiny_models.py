"""Configurations of a few thousand parameters, for every architecture that tests use."""

from __future__ import annotations

VOCABULARY = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", *[f"w{i}" for i in range(35)]]
COMMON = dict(vocab_size=len(VOCABULARY), pad_token_id=0, eos_token_id=1, bos_token_id=1)
LLAMA = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
NEOX = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
# Widths are multiples of 32, which 4-bit layers need.
SIZES = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    # A sliding window on every layer, on none, and on alternate layers.
    "mistral": {**LLAMA, "sliding_window": 4},
    "phi3": {**LLAMA, "sliding_window": 4},
    "gemma3_text": {**LLAMA, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma2": {**LLAMA, "sliding_window": 4, "attn_logit_softcapping": 2.0, "final_logit_softcapping": None},
    "gpt2": GPT2,
    "gpt_neox": NEOX,
    "opt": dict(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32),
    "gptj": {**GPT2, "rotary_dim": 4},
    "phi": LLAMA,
    "olmo2": LLAMA,
    "stablelm": LLAMA,
    "smollm3": LLAMA,
    "gpt_bigcode": GPT2,
}


def tiny_config(architecture="llama", sizes=None, **changes):
    """A config with random weights in mind; `sizes` replaces the entry of `SIZES`, `changes` add to it."""
    from transformers import AutoConfig

    return AutoConfig.for_model(architecture, **{**COMMON, **(sizes or SIZES[architecture]), **changes})


def word_tokenizer(vocabulary):
    """A tokenizer of words separated by spaces; the first three are padding, EOS and the unknown word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
