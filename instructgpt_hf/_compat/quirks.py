"""Upstream behaviour that is worked around, one function per quirk: messages, data, trainers, models, generation.

Versions in which a cause was seen: transformers 5.23 and 5.24, TRL 1.16, PEFT 0.21.2, accelerate 1.15, datasets 5.2,
bitsandbytes 0.50.2, huggingface_hub 2.4. Heavy libraries are imported inside the functions: `config`, `hub` and the
command line import this file before they need any.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, IterableDataset
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments
    from transformers.utils import ModelOutput
    from trl import RLOOConfig
    from trl.generation.vllm_generation import VLLMGeneration

COMPLETION_COLUMN = "_completion_of_the_dataset"


@contextlib.contextmanager
def quiet_environment() -> Iterator[None]:
    """Silence, inside the block, messages of the libraries that a user cannot act on.

    Cause: TRL uses deprecated names, torch warns of pinned memory on a CPU, and loading logs each step.
    Goes when: TRL uses the new names, and the libraries log nothing on a plain run.
    Relies on: the loggers `transformers`, `bitsandbytes` and `trl`, and `TRANSFORMERS_NO_ADVISORY_WARNINGS`.
    """
    variable = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    loggers = [logging.getLogger(name) for name in ("transformers", "bitsandbytes", "trl")]
    levels, advisory = [logger.level for logger in loggers], os.environ.get(variable)
    os.environ[variable] = "1"
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        os.environ.pop(variable, None)
        os.environ.update({} if advisory is None else {variable: advisory})


def remove_progress_displays(trainer: Trainer) -> None:
    """Remove the Trainer's own bars and printed metrics from a trainer.

    Cause: it chooses a display by the settings and by whether it runs in a notebook, where the chosen one raises a
        TypeError when training is stopped before its first evaluation.
    Goes when: the Trainer can be built without a display.
    Relies on: `transformers.trainer.DEFAULT_PROGRESS_CALLBACK`, the display in a notebook.
    """
    from transformers import PrinterCallback, ProgressCallback
    from transformers import trainer as module

    for callback in (PrinterCallback, ProgressCallback, module.DEFAULT_PROGRESS_CALLBACK):
        trainer.remove_callback(callback)


@contextlib.contextmanager
def no_library_bars() -> Iterator[None]:
    """Draw none of the libraries' progress bars inside the block.

    Cause: transformers, datasets and huggingface_hub have a switch each, which some of their functions turn on again.
    Goes when: one switch covers all of them.
    Relies on: their bars being subclasses of `tqdm.tqdm`, which takes `disable`.
    """
    from tqdm import tqdm

    begin = tqdm.__init__

    def begin_disabled(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **{**kwargs, "disable": True})

    tqdm.__init__ = begin_disabled
    try:
        yield
    finally:
        tqdm.__init__ = begin


def silence_kernel_hint() -> None:
    """Drop bitsandbytes' warning that an optional kernel package is missing.

    Cause: bitsandbytes looks for the CPU kernel when it is imported, which importing TRL does.
    Goes when: bitsandbytes warns only where 4-bit weights are used.
    Relies on: the logger `bitsandbytes.backends.cpu.ops` and the kernel's name `gemm_4bit` in the message.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit" not in record.getMessage())


def connection_error() -> type[BaseException]:
    """The base class of every error of the HTTP library below huggingface_hub.

    Cause: huggingface_hub raises that library's errors, and has changed it twice (requests, httpx, httpx2).
    Goes when: huggingface_hub has an error of its own for a failed connection.
    Relies on: `HfHubHTTPError` inheriting from the library's error first.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


@contextlib.contextmanager
def offline_mode() -> Iterator[None]:
    """Let huggingface_hub and datasets read their caches alone inside the block, as under `HF_HUB_OFFLINE=1`.

    Cause: without a network every call waits through its retries first, and the mode is a variable read at import.
    Goes when: both have a context or an argument for it.
    Relies on: both reading their constant `HF_HUB_OFFLINE` at every call.
    """
    import datasets
    import huggingface_hub

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def dataset_refusal(error: Exception) -> str | None:
    """What the Hub said when `datasets` could not load a dataset: "gated" or "missing"; None for other errors.

    Cause: datasets raises an error of its own and drops huggingface_hub's, which has the status.
    Goes when: its `DatasetNotFoundError` keeps the error as its cause.
    Relies on: the words of its messages.
    """
    if type(error).__name__ != "DatasetNotFoundError":
        return None
    words = {"is a gated dataset": "gated", "doesn't exist on the Hub": "missing"}
    return next((kind for part, kind in words.items() if part in str(error)), None)


def dataset_fingerprint(dataset: Dataset | IterableDataset) -> str:
    """The hash of how a dataset came about, for data that are not local files.

    Cause: datasets has no public name for the hash.
    Goes when: it has one.
    Relies on: `Dataset._fingerprint` depending on the content.
    """
    return str(dataset._fingerprint)


@contextlib.contextmanager
def own_tracker_run() -> Iterator[None]:
    """End a Weights & Biases run that begins inside the block when the block ends; leave one from outside open.

    Cause: the Trainer leaves its run open, so that the next stage's metrics would go into it.
    Goes when: the Trainer ends the run that it began.
    Relies on: `wandb.run`, None where no run is open.
    """
    before = getattr(sys.modules.get("wandb"), "run", None)
    try:
        yield
    finally:
        wandb: Any = sys.modules.get("wandb")
        current = getattr(wandb, "run", None)
        if current is not None and current is not before:
            wandb.finish()


def settle_checkpointing_names(args: Any) -> None:
    """Give the new names of gradient checkpointing the values of the old ones, which TRL uses.

    Cause: transformers 5.2x renames two arguments and warns of the old name alone, which TRL's configs set.
    Goes when: TRL's configs use the new names.
    Relies on: transformers accepting both names with the same value.
    """
    for end in ("checkpointing", "checkpointing_kwargs"):
        if getattr(args, f"activation_{end}", False) is None:
            setattr(args, f"activation_{end}", getattr(args, f"gradient_{end}"))


def whole_batch_group(config: RLOOConfig) -> None:
    """Let a config with one completion per prompt pass the checks of RLOOConfig; `num_generations` is set back after.

    Cause: `RLOOConfig` refuses `num_generations` below 2, because RLOO's baseline is the mean of other completions.
    Goes when: it allows one, or PPO has a config of its own in TRL.
    Relies on: a group as large as the whole batch passing every check.
    """
    config.num_generations, config.num_generations_eval = config.generation_batch_size, 1


@contextlib.contextmanager
def no_reference_from_disk(args: RLOOConfig) -> Iterator[None]:
    """Let RLOOTrainer load no reference model while it is built in this block.

    Cause: with `beta` above 0 it loads the policy's source again; ours is a copy of the policy, which need not have
        one, or the adapter "ref", which it adds to a PEFT policy whatever `beta` is.
    Goes when: RLOOTrainer takes a reference model.
    Relies on: its constructor reading `args.beta` once, into `self.beta`.
    """
    beta, args.beta = args.beta, 0.0
    try:
        yield
    finally:
        args.beta = beta


def pass_completion_column(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give the column `completion` of the prompts another name, `COMPLETION_COLUMN`, on its way to reward functions.

    Cause: TRL leaves it out of the columns that reward functions receive, for the sake of SFT's datasets.
    Goes when: TRL passes every column on.
    Relies on: it passing columns of other names.
    """
    return [{COMPLETION_COLUMN if key == "completion" else key: value for key, value in row.items()} for row in rows]


def use_one_device(args: TrainingArguments) -> None:
    """Train on the first GPU where a single process sees several; `accelerate launch` starts a process for each.

    Cause: the Trainer's `DataParallel` splits each tensor by rows; in a batch of rankings they differ in length.
    Goes when: the Trainer does not use `DataParallel`.
    Relies on: `TrainingArguments.n_gpu` returning `_n_gpu`.
    """
    args._n_gpu = min(args.n_gpu, 1)


@contextlib.contextmanager
def keep_trained_weights(model: torch.nn.Module) -> Iterator[None]:
    """Undo the rounding of a quantised model's trained weights by a TRL trainer that is built in this block.

    Cause: TRL rounds them to bfloat16 (peft#2889), which loses updates below 1/512 of a weight, most of a head's.
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

    Cause: a copy keeps the `forward` that TRL's `add_fused_lm_head` or accelerate set, with the original's weights.
    Goes when: a copy runs its own weights.
    Relies on: the attributes `forward` and `_original_forward`; with `_hf_hook` (several devices) they are needed.
    """
    from instructgpt_hf._compat.peft import unwrap_peft

    for module in (model, unwrap_peft(model)):
        if not hasattr(module, "_hf_hook"):
            for name in ("forward", "_original_forward"):
                vars(module).pop(name, None)


def set_vllm_weights(vllm: VLLMGeneration, weights: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> None:
    """Let a vLLM engine take its weights, by the names of a plain model, from `weights` at every synchronisation.

    Cause: TRL merges all adapters into the base, sends value and reward adapters too, and leaves the base rounded.
    Goes when: TRL's synchronisation takes the weights, or the adapter, as an argument.
    Relies on: `VLLMGeneration._iter_named_params` being the only source of the weights sent.
    """
    vllm._iter_named_params = weights


def disable_dropout(model: torch.nn.Module) -> None:
    """Switch every dropout off.

    Cause: TRL's `disable_dropout_in_model` sets `nn.Dropout` only; OPT and others call the function instead.
    Goes when: TRL's function covers these, or transformers' models use modules.
    Relies on: the names of the attributes with the probability, and their type, float.
    """
    from trl.trainer.utils import disable_dropout_in_model

    disable_dropout_in_model(model)
    for module in model.modules():
        for name in ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "layerdrop"):
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

    Cause: bitsandbytes repacks the weight at its first evaluation there, for a kernel that silently has no gradient.
    Goes when: the kernel has a backward pass, or training unpacks the weight.
    Relies on: `Linear4bit.support_avx512bf16_for_cpu` being read in every forward pass.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - unknown to nn.Module


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether the weights of a model in memory are quantised.

    Cause: transformers' `config.quantization_config` describes the file; the model has no such property.
    Goes when: it has one.
    Relies on: `hf_quantizer`, absent or None without quantisation.
    """
    return getattr(model, "hf_quantizer", None) is not None


def take_quantization(config: PreTrainedConfig, model: PreTrainedModel) -> dict[str, Any] | None:
    """Remove from a config, a copy of the model's, the quantisation that was applied while loading, and return it.

    Cause: transformers writes it into the config as `quantization_config`, as if the file held quantised weights.
    Goes when: transformers tells the two apart in the config.
    Relies on: `hf_quantizer.pre_quantized`.
    """
    if not is_quantized(model) or model.hf_quantizer.pre_quantized:
        return None
    return vars(config).pop("quantization_config").to_dict()


def attention_implementation(config: PreTrainedConfig) -> str:
    """Name of the attention that a model computes with, such as `sdpa` or `eager`.

    Cause: transformers has no public name for its choice.
    Goes when: it has one.
    Relies on: `config._attn_implementation` naming the implementation in use.
    """
    return str(config._attn_implementation)


def has_sharded_weights(model: torch.nn.Module) -> bool:
    """Whether a forward pass needs all processes to take part: FSDP and DeepSpeed ZeRO-3.

    Cause: transformers has two checks, in modules that move between releases.
    Goes when: transformers or accelerate has one public function.
    Relies on: `is_fsdp_managed_module` and `is_deepspeed_zero3_enabled`.
    """
    from transformers.distributed.fsdp import is_fsdp_managed_module
    from transformers.integrations import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled() or any(is_fsdp_managed_module(module) for module in model.modules())


def next_inputs(model: PreTrainedModel, outputs: ModelOutput, inputs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `model.prepare_inputs_for_generation` for the next token, as `generate` makes them.

    Cause: under `generate(custom_generate=...)`, mask, positions and cache are updated by a private method only.
    Goes when: the method has a public name.
    Relies on: the result holding the cache (`cache_name`) and an `attention_mask` one column wider.
    """
    return model._update_model_kwargs_for_generation(outputs, inputs)


def cache_name(inputs: Mapping[str, Any]) -> str | None:
    """The name that a generating model's key-value cache has among its keyword arguments; None if there is no cache.

    Cause: transformers 5.24 renames `past_key_values` to `cache`.
    Goes when: the lower bound of transformers is 5.24.
    Relies on: no other argument being a `Cache`.
    """
    from transformers import Cache

    return next((name for name, value in inputs.items() if isinstance(value, Cache)), None)


@contextlib.contextmanager
def call_settings_only(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Let a call of `generate` inside use its own `generation_config` only, and the model's special tokens.

    Cause: `generate` takes others (`suppress_tokens`) from the model's files, which log-probabilities do not reflect.
    Goes when: `generate` can be told to ignore the model's settings.
    Relies on: `generate` reading `model.generation_config`, one object for a PEFT model and its base.
    """
    from transformers import GenerationConfig

    config = model.generation_config
    kept = vars(config)
    tokens = {name: kept.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config.__dict__ = vars(GenerationConfig(**tokens))
    try:
        yield
    finally:
        config.__dict__ = kept


@contextlib.contextmanager
def rounded_weights(model: torch.nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Round the floating weights inside the block, and put the very same tensors back. None rounds nothing.

    Cause: autocast does not reach the thread of continuous batching. TRL rounds the weights for good instead.
    Goes when: `generate_batch` takes a dtype or passes autocast on to its thread.
    Relies on: `generate_batch` reading the parameters at every step.
    """
    kept = [(item, item.data) for item in model.parameters() if dtype is not None and item.dtype.is_floating_point]
    for item, data in kept:
        item.data = data.to(dtype)
    try:
        yield
    finally:
        for item, data in kept:
            item.data = data
