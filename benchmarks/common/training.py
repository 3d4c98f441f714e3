"""Loading and training settings of every contender. Runs in the peer's environment too: torch and transformers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig

# Dtype of the loaded weights; `mixed` computes in bfloat16 on float32 weights, by autocast.
WEIGHTS = {"float32": torch.float32, "mixed": torch.float32, "bfloat16": torch.bfloat16}
# Of a LoRA adapter.
ADAPTER = dict(r=16, lora_alpha=32, target_modules="all-linear")


def model_options(train: str, dtype: str, cuda: bool) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained`.

    Args:
        train: full, lora or qlora.
        dtype: a key of `WEIGHTS`.
        cuda: whether to load onto the GPU.
    """
    options: dict[str, Any] = {"dtype": WEIGHTS[dtype]}
    if train == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
        )
    if cuda:
        options["device_map"] = {"": "cuda:0"}
    return options


def training_settings(folder: str, cuda: bool) -> dict[str, Any]:
    """Training arguments of every run: a constant learning rate, nothing saved, reported or drawn on the way."""
    return {
        "output_dir": folder,
        "lr_scheduler_type": "constant",
        "use_cpu": not cuda,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
