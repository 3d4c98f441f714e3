"""Models of the benchmarks whose weights are drawn at random: only their shapes matter."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

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


def write_random(name: str, folder: Path, dtype: torch.dtype) -> None:
    """Write a model folder with the lab's tokenizer, one shard at a time in memory.

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
            if weight.dim() > 1:  # norms keep their ones
                weight.normal_(0.0, config.initializer_range, generator=draw)
        save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = json.dumps({"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
        (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
