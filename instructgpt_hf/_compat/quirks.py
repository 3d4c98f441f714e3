"""Upstream behaviour that is worked around, one function per quirk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.distributed.fsdp import is_fsdp_managed_module
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import disable_dropout_in_model

from instructgpt_hf._compat.peft import unwrap_peft


def dataset_fingerprint(dataset: Any) -> str:
    """The hash that `datasets` keeps of how a dataset came about, for data that are not local files."""
    return str(dataset._fingerprint)


def use_one_device(args: Any) -> None:
    """Train on the first GPU where a single process sees several, instead of in the Trainer's `DataParallel`.

    `DataParallel` splits tensors by rows, which takes batches of another shape apart; `accelerate launch` starts a
    process for each GPU.
    """
    if args.n_gpu > 1:
        args._n_gpu = 1


def next_inputs(model: Any, outputs: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `model.prepare_inputs_for_generation` for the next token, as `generate` makes them."""
    updated: dict[str, Any] = model._update_model_kwargs_for_generation(outputs, inputs)
    return updated


def has_sharded_weights(model: torch.nn.Module) -> bool:
    """Whether a forward pass needs all processes to take part: FSDP and DeepSpeed ZeRO-3."""
    return is_deepspeed_zero3_enabled() or any(is_fsdp_managed_module(module) for module in model.modules())


def set_vllm_weights(vllm: VLLMGeneration, weights: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> None:
    """Let a vLLM engine take its weights, by the names of a plain model, from `weights` at every synchronisation."""
    vllm._iter_named_params = weights


@contextlib.contextmanager
def quiet_environment() -> Iterator[None]:
    """Silence messages of the libraries below that a user cannot act on, for the length of the block."""
    import logging
    import warnings

    names = ("transformers", "bitsandbytes", "trl")
    levels = {name: logging.getLogger(name).level for name in names}
    advisory = os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS")
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # TRL asks for the old name of gradient checkpointing; pinned memory has no meaning on a CPU.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if advisory is None:
            os.environ.pop("TRANSFORMERS_NO_ADVISORY_WARNINGS", None)
        else:
            os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = advisory


def restore_cpu_gradients(model: torch.nn.Module) -> None:
    """Keep 4-bit layers differentiable on CPUs with AVX512-bf16.

    There bitsandbytes repacks a 4-bit weight in place at the first evaluation for a kernel without a backward pass,
    after which gradients through the base are silently lost. CUDA does not take that path.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - unknown to nn.Module


def use_own_forward(model: Any) -> None:
    """Let a model, whole or PEFT, run its own weights.

    TRL's trainers put a `forward` on a model that calls the one it had. A copy of such a model has it too,
    and runs with the weights of the model it was copied from. The trainer that put it there needs it: it cannot be
    used afterwards.
    """
    for module in (model, unwrap_peft(model)):
        if not hasattr(module, "_hf_hook"):  # where accelerate spreads the weights over devices, that `forward` is its
            for name in ("forward", "_original_forward"):
                vars(module).pop(name, None)


@contextlib.contextmanager
def keep_trained_weights(model: torch.nn.Module) -> Iterator[None]:
    """Undo what TRL's trainers do to the trained weights of a quantised model when they are built in this block.

    TRL rounds adapters and head to bfloat16, in which an update smaller than half a step, 1/512 of the weight or more,
    is lost: at the paper's learning rate almost no weight of a head ever moves. Mixed precision works without.
    """
    kept = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    yield
    for parameter, data in kept:
        if parameter.dtype != data.dtype:
            parameter.data = data


FUNCTIONAL_DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "layerdrop")


def disable_dropout(model: torch.nn.Module) -> None:
    """Switch every dropout off, also those that an architecture such as OPT applies without a module of its own."""
    disable_dropout_in_model(model)
    for module in model.modules():
        for name in FUNCTIONAL_DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def enable_checkpointing(model: Any, settings: dict[str, Any], **options: Any) -> None:
    """Switch activation checkpointing on under the name that the installed transformers has for it.

    Args:
        model: a transformers model.
        settings: for `torch.utils.checkpoint.checkpoint`.
        options: what else transformers' method takes.
    """
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings, **options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings, **options)
