"""Upstream behaviour that is worked around, one function per quirk.

Versions in which a cause was seen: transformers 5.23, TRL 1.16, PEFT 0.21.2, accelerate 1.15, datasets 5.2,
bitsandbytes 0.50.2, huggingface_hub 2.4. Heavy libraries are imported inside the functions: `config`, `hub` and the
command line import this file before they need any.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, IterableDataset
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
    from transformers.utils import ModelOutput
    from trl.generation.vllm_generation import VLLMGeneration

# Messages and errors


@contextlib.contextmanager
def quiet_environment() -> Iterator[None]:
    """Silence, inside the block, messages of the libraries that a user cannot act on.

    Cause: TRL calls transformers' deprecated gradient checkpointing; torch warns of pinned memory on a CPU; loading
        logs each step at level INFO.
    Goes when: TRL uses the new names, and the libraries log nothing on a plain run.
    Relies on: the loggers `transformers`, `bitsandbytes` and `trl`, and `TRANSFORMERS_NO_ADVISORY_WARNINGS`.
    """
    names = ("transformers", "bitsandbytes", "trl")
    levels = {name: logging.getLogger(name).level for name in names}
    advisory = os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS")
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
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


def silence_kernel_hint() -> None:
    """Drop bitsandbytes' warning that an optional kernel package is missing.

    Cause: bitsandbytes looks for a CPU kernel on the Hub when it is imported, which importing TRL does.
    Goes when: bitsandbytes warns only where 4-bit weights are used.
    Relies on: the logger `bitsandbytes.backends.cpu.ops` and the kernel's name `gemm_4bit` in the message.
    """
    hint = logging.getLogger("bitsandbytes.backends.cpu.ops")
    hint.addFilter(lambda record: "gemm_4bit" not in record.getMessage())


def connection_error() -> type[BaseException]:
    """The base class of every error of the HTTP library below huggingface_hub.

    Cause: huggingface_hub raises the errors of its HTTP library, and has changed the library twice (requests, httpx,
        httpx2).
    Goes when: huggingface_hub raises an error of its own for a failed connection.
    Relies on: `HfHubHTTPError` inheriting from that library's error first.
    """
    from huggingface_hub.errors import HfHubHTTPError

    base: type[BaseException] = HfHubHTTPError.__bases__[0]
    return base


# Data


def dataset_fingerprint(dataset: Dataset | IterableDataset) -> str:
    """The hash of how a dataset came about, for data that are not local files.

    Cause: datasets hashes every dataset and has no public name for the hash.
    Goes when: datasets has a public attribute.
    Relies on: `Dataset._fingerprint` depending on the content.
    """
    return str(dataset._fingerprint)


# Training arguments and trainers


def settle_checkpointing_names(args: Any) -> None:
    """Give the new names of gradient checkpointing the values of the old ones, which TRL uses.

    Cause: transformers 5.2x renames `gradient_checkpointing` to `activation_checkpointing` in `TrainingArguments`; a
        value under the old name alone warns. TRL's configs set the old name.
    Goes when: TRL's configs use the new names.
    Relies on: the old names winning where both are set to the same value.
    """
    for old, new in (
        ("gradient_checkpointing", "activation_checkpointing"),
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    ):
        if hasattr(args, new) and getattr(args, new) is None:
            setattr(args, new, getattr(args, old))


def use_one_device(args: TrainingArguments) -> None:
    """Train on the first GPU where a single process sees several; `accelerate launch` starts a process for each.

    Cause: transformers' Trainer wraps the model in `DataParallel`, which splits every tensor of a batch by rows. A
        batch of rankings has tensors of several lengths.
    Goes when: the Trainer no longer uses `DataParallel`.
    Relies on: `TrainingArguments.n_gpu` returning `_n_gpu`.
    """
    if args.n_gpu > 1:
        args._n_gpu = 1


@contextlib.contextmanager
def keep_trained_weights(model: torch.nn.Module) -> Iterator[None]:
    """Undo the rounding of a quantised model's trained weights by a TRL trainer that is built in this block.

    Cause: TRL rounds them to bfloat16, for want of PEFT's `autocast_adapter_dtype` on quantised models (peft#2889).
        An update below 1/512 of the weight is then lost: at the paper's learning rate almost no weight of a head ever
        moves. Mixed precision works without.
    Goes when: TRL leaves the dtype of trained weights alone.
    Relies on: TRL setting `parameter.data`, and nothing else, in the constructor.
    """
    kept = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    yield
    for parameter, data in kept:
        if parameter.dtype != data.dtype:
            parameter.data = data


def use_own_forward(model: PreTrainedModel | PeftModel) -> None:
    """Let a model run its own weights. The trainer that had it before cannot be used afterwards.

    Cause: TRL's `add_fused_lm_head` sets a `forward` on the model that calls the model's earlier one. A copy of the
        model then runs the weights of the original. In mixed precision, accelerate wraps that `forward` once more.
    Goes when: TRL's head works without the attribute `forward`, or a copy runs its own weights.
    Relies on: the wrappers being the attributes `forward` and `_original_forward`. Where accelerate spreads the
        weights over devices (`_hf_hook`), `forward` is needed and stays.
    """
    from instructgpt_hf._compat.peft import unwrap_peft

    for module in (model, unwrap_peft(model)):
        if not hasattr(module, "_hf_hook"):
            for name in ("forward", "_original_forward"):
                vars(module).pop(name, None)


def set_vllm_weights(vllm: VLLMGeneration, weights: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> None:
    """Let a vLLM engine take its weights, by the names of a plain model, from `weights` at every synchronisation.

    Cause: TRL merges every adapter of a PEFT model into its base and sends all weights, also those of value and reward
        adapters, and leaves the base's weights rounded by the merge.
    Goes when: TRL's synchronisation takes the weights, or the adapter, as an argument.
    Relies on: `VLLMGeneration._iter_named_params` being the only source of the weights sent.
    """
    vllm._iter_named_params = weights


# Models

FUNCTIONAL_DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "layerdrop")


def disable_dropout(model: torch.nn.Module) -> None:
    """Switch every dropout off.

    Cause: TRL's `disable_dropout_in_model` sets modules of type `nn.Dropout` only. Architectures such as OPT call the
        function with a probability that they keep as an attribute.
    Goes when: TRL's function covers these, or transformers' models use modules.
    Relies on: the attributes' names and their type, float.
    """
    from trl.trainer.utils import disable_dropout_in_model

    disable_dropout_in_model(model)
    for module in model.modules():
        for name in FUNCTIONAL_DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def enable_checkpointing(model: PreTrainedModel, settings: dict[str, Any], **options: Any) -> None:
    """Switch activation checkpointing on, with settings of `torch.utils.checkpoint.checkpoint`.

    Cause: transformers 5.2x renames the method; the old name warns.
    Goes when: the lower bound of transformers has the new name.
    Relies on: one of the two names, both with the settings as a keyword.
    """
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings, **options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings, **options)


def restore_cpu_gradients(model: torch.nn.Module) -> None:
    """Keep 4-bit layers differentiable on CPUs with AVX512-bf16.

    Cause: bitsandbytes repacks a 4-bit weight in place at the first evaluation there, for a kernel without a backward
        pass; gradients through the base are then lost without an error. CUDA does not take that path.
    Goes when: the kernel has a backward pass, or training unpacks the weight.
    Relies on: `Linear4bit.support_avx512bf16_for_cpu` being read in every forward pass.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - unknown to nn.Module


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether the weights of a model in memory are quantised.

    Cause: transformers has `config.quantization_config` as a setting of the file, and no property of the model.
    Goes when: it has one.
    Relies on: `hf_quantizer`, absent or None without quantisation.
    """
    return getattr(model, "hf_quantizer", None) is not None


def take_quantization(config: PreTrainedConfig, model: PreTrainedModel) -> dict[str, Any] | None:
    """Remove from a config, a copy of the model's, the quantisation that was applied while loading, and return it.

    Cause: transformers writes it into the model's config as `quantization_config`, which in a saved config means that
        the file holds quantised weights. A base quantised while loading is a file of unquantised ones.
    Goes when: transformers tells the two apart in the config.
    Relies on: `hf_quantizer.pre_quantized`.
    """
    if not is_quantized(model) or model.hf_quantizer.pre_quantized:
        return None
    values: dict[str, Any] = config.quantization_config.to_dict()
    del config.quantization_config
    return values


def attention_implementation(config: PreTrainedConfig) -> str:
    """Name of the attention that a model computes with: `sdpa`, `eager`, `flex_attention`, ...

    Cause: transformers has no public name for the implementation that it chose.
    Goes when: it has one.
    Relies on: `config._attn_implementation` naming the implementation in use.
    """
    return str(config._attn_implementation)


def has_sharded_weights(model: torch.nn.Module) -> bool:
    """Whether a forward pass needs all processes to take part: FSDP and DeepSpeed ZeRO-3.

    Cause: transformers has the two checks, in modules that move between releases.
    Goes when: transformers or accelerate has one public function for both.
    Relies on: `is_fsdp_managed_module` and `is_deepspeed_zero3_enabled`.
    """
    from transformers.distributed.fsdp import is_fsdp_managed_module
    from transformers.integrations import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled() or any(is_fsdp_managed_module(module) for module in model.modules())


# Generation


def next_inputs(model: PreTrainedModel, outputs: ModelOutput, inputs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `model.prepare_inputs_for_generation` for the next token, as `generate` makes them.

    Cause: a loop under `generate(custom_generate=...)` has to update mask, positions and cache as transformers' own
        loop does, which calls a private method.
    Goes when: the method has a public name.
    Relies on: the result holding `past_key_values` and an `attention_mask` one column wider.
    """
    updated: dict[str, Any] = model._update_model_kwargs_for_generation(outputs, inputs)
    return updated


@contextlib.contextmanager
def call_settings_only(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Let a call of `generate` inside use its own `generation_config` only, and the model's special tokens.

    Cause: `generate` takes settings that the call does not give from the model's files (`no_repeat_ngram_size`,
        `suppress_tokens`, `num_beams`, ...). Samples would then not come from the distribution whose log-probabilities
        are taken.
    Goes when: `generate` can be told to ignore the model's settings.
    Relies on: `generate` reading the attributes of `model.generation_config`, an object that a PEFT model and its base
        share, hence the change in place.
    """
    from transformers import GenerationConfig

    own = vars(model.generation_config)
    kept = dict(own)
    tokens = {name: kept.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    own.clear()
    own.update(vars(GenerationConfig(**tokens)))
    try:
        yield
    finally:
        own.clear()
        own.update(kept)


@contextlib.contextmanager
def rounded_weights(model: torch.nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Round the floating weights inside the block, and put the very same tensors back. None rounds nothing.

    Cause: transformers' continuous batching generates in a thread of its own, which autocast of the caller does not
        reach, and its cache has the weights' precision. TRL rounds the weights in place, for good.
    Goes when: `generate_batch` takes a dtype or passes autocast on to its thread.
    Relies on: `generate_batch` reading the parameters at every step.
    """
    kept = [
        (item, item.data)
        for item in model.parameters()
        if dtype is not None and item.dtype != dtype and item.dtype.is_floating_point
    ]
    for item, data in kept:
        item.data = data.to(dtype)
    try:
        yield
    finally:
        for item, data in kept:
            item.data = data
