"""What the tests of the stages put on disk: rows, tiny models, recipes."""

import json

import torch
from transformers import AutoModelForCausalLM, LlamaConfig


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_model(folder, tokenizer, **changes):
    """A random Llama of a few thousand parameters for a tokenizer of 64 words, padding id 0 and EOS id 1."""
    sizes = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**sizes, **changes}))
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_recipe(folder, stages):
    """One YAML file per stage; JSON is YAML."""
    folder.mkdir(parents=True)
    for stage, values in stages.items():
        lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items())
        (folder / f"{stage}.yaml").write_text(lines, encoding="utf-8")
    return folder
