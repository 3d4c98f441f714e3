"""Model folders, random models, of which only the shapes matter, and random tokens."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from instructgpt_hf import lab
from instructgpt_hf.models.loading import load_tokenizer

# 3.4 million parameters under SmolLM2's vocabulary; 1.3 and 7 billion.
RANDOM: dict[str, dict[str, int]] = {
    "random-3m": dict(
        vocab_size=49152, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4
    ),
    "random-1b": dict(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "random-7b": dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    ),
}
NEED_GPU = ("random-1b", "random-7b")
SHARD_SIZE = "1GB"


def model_folder(name: str) -> Path:
    """The folder of `lab`, the lab's base model, or `name` itself as a folder."""
    return lab.base_model_path() if name == "lab" else Path(name)


def write_random(name: str, folder: Path, dtype: torch.dtype) -> Path:
    """Write a model folder with the lab's tokenizer, holding one shard at a time in memory.

    Args:
        name: a key of `RANDOM`.
        folder: to make.
        dtype: of the weights.
    """
    tokenizer = load_tokenizer(lab.base_model_path())
    tokens = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    config = AutoConfig.for_model(
        "llama", **RANDOM[name], **tokens, max_position_embeddings=2048, tie_word_embeddings=True
    )
    config.architectures, config.dtype = ["LlamaForCausalLM"], dtype
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.device("meta"):
        empty = dict(AutoModelForCausalLM.from_config(config, dtype=dtype).named_parameters())
    plan = split_torch_state_dict_into_shards(empty, max_shard_size=SHARD_SIZE)
    draw = torch.Generator().manual_seed(0)
    for file, members in plan.filename_to_tensors.items():
        shard = {member: torch.ones(empty[member].shape, dtype=dtype) for member in members}
        for weight in shard.values():
            if weight.dim() > 1:  # the weights of norms stay 1
                weight.normal_(0.0, config.initializer_range, generator=draw)
        save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = json.dumps({"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
        (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return folder


class RandomTokens:
    """Draws random token ids without special tokens, the same ones in every process.

    Args:
        tokenizer: whose special tokens are left out.
        vocabulary: number of tokens that the model knows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        self.generator = torch.Generator().manual_seed(0)
        special = set(tokenizer.all_special_ids)
        self.ids = torch.tensor([token for token in range(min(vocabulary, len(tokenizer))) if token not in special])

    def draw(self, length: int) -> list[int]:
        """`length` token ids."""
        return self.ids[torch.randint(len(self.ids), (length,), generator=self.generator)].tolist()

    def permutation(self, length: int) -> list[int]:
        """A random order of 0 to `length` - 1."""
        return torch.randperm(length, generator=self.generator).tolist()


def strict_pairs(row: dict[str, Any]) -> list[tuple[Any, Any]]:
    """`completion_ids` of every pair of a ranking without ties, the better completion first."""
    ranked: Sequence[tuple[int, Any]] = list(zip(row["ranks"], row["completion_ids"], strict=True))
    return [(better, worse) for (high, better), (low, worse) in itertools.permutations(ranked, 2) if high < low]
