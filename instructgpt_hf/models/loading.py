"""Tokenizers, configs and policies from a local folder, a Hub id or the lab, whole or as adapters."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from instructgpt_hf._compat.quirks import restore_cpu_gradients
from instructgpt_hf.errors import InstructGPTError, Problems, loading_errors
from instructgpt_hf.models.adapters import POLICY_ADAPTER, adapter_of
from instructgpt_hf.models.origins import adapter_base, adapter_values, is_adapter

logger = logging.getLogger(__name__)

# Tokens that models reserve for padding, or that no text contains, in order of preference.
PAD_CANDIDATES = ("<pad>", "<|pad|>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")
NEW_PAD_TOKEN = "<|pad|>"
# Settings of a recipe and, where it differs, their name in PEFT's adapter_config.json.
_ADAPTER_SETTINGS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora")
_PEFT_NAMES = {"lora_r": "r", "lora_target_modules": "target_modules"}
# Settings of generation that decide which others have a meaning.
_GENERATION_MODES = ("do_sample", "num_beams", "use_cache", "return_dict_in_generate")


def absolute_source(folder: str | Path) -> str:
    """A folder's absolute path, for `from_pretrained`, which names the model by it; a Hub id stays.

    The name goes into `adapter_config.json` and `tokenizer_config.json`. A relative path there reads as a Hub id once
    the working directory is another.
    """
    path = Path(folder).expanduser()
    return str(path.absolute() if path.is_dir() else folder)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a padding token that differs from EOS.

    transformers' sequence classifiers score the last token that is not padding: with padding = EOS, that before EOS.

    Raises:
        InstructGPTError: if the tokenizer cannot be loaded or has no EOS token.
    """
    with loading_errors(f"{folder}: no tokenizer could be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(absolute_source(folder))
    settle_special_tokens(tokenizer, str(folder))
    return tokenizer


def settle_special_tokens(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Give a tokenizer a padding token that differs from EOS, and let it pad on the left, as generation needs it.

    Raises:
        InstructGPTError: if it has no EOS token; `where` names it.
    """
    if tokenizer.eos_token is None:
        raise InstructGPTError(f"{where}: the tokenizer has no EOS token, so no completion could end.")
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        usable = tokenizer.get_vocab().keys() - {tokenizer.eos_token}
        pad_token = next((token for token in PAD_CANDIDATES if token in usable), NEW_PAD_TOKEN)
        tokenizer.add_special_tokens({"pad_token": pad_token})
    tokenizer.padding_side = "left"


def adapter_config(folder: Path) -> PeftConfig:
    """PEFT's config of an adapter folder, with the local folder of its base model, wherever that was in training."""
    config = PeftConfig.from_pretrained(str(folder))
    config.base_model_name_or_path, config.revision = str(adapter_base(folder)), None
    return config


def check_adapter_settings(folders: Iterable[Path], given: dict[str, Any], where: str) -> None:
    """Check a recipe's LoRA settings against the adapters that the stage continues to train.

    If one of the models is whole, the settings describe its fresh adapter, and nothing is checked.

    Args:
        folders: models that the stage trains.
        given: settings of the recipe, by key.
        where: file of the recipe, for the message.

    Raises:
        InstructGPTError: listing every setting without effect, and the adapter's value.
    """
    folders = list(folders)
    if all(map(is_adapter, folders)):
        compare_adapter_settings(list(map(adapter_values, folders)), given, where, " and ".join(map(str, folders)))


def compare_adapter_settings(adapters: list[dict[str, Any]], given: dict[str, Any], where: str, shown: str) -> None:
    """As `check_adapter_settings`, for adapters by their values in `adapter_config.json`.

    Args:
        shown: what the message calls them.
    """
    problems = Problems(
        f"{where}: this stage continues to train the adapter of {shown} as it is. These settings would have no "
        "effect; remove them, or start from a whole model (`instructgpt-hf merge` makes one of an adapter):"
    )
    if given.get("use_peft") is False:
        problems.add("use_peft = False: only the adapter can be trained")
    for key in (key for key in _ADAPTER_SETTINGS if key in given and given[key] != "all-linear"):
        trained = [_comparable(adapter.get(_PEFT_NAMES.get(key, key))) for adapter in adapters]
        if "all-linear" not in trained and _comparable(given[key]) not in trained:
            problems.add(f"{key} = {given[key]!r}: the adapter has {' or '.join(map(repr, trained))}")
    problems.raise_if_any()


def _comparable(value: Any) -> Any:
    """A value for comparison: a list of modules becomes the last parts of their names, as recipes list them."""
    return sorted({name.rsplit(".", 1)[-1] for name in value}) if isinstance(value, (list, set)) else value


def load_config(folder: Path) -> PreTrainedConfig:
    """The config of a model folder; for an adapter folder, the config of its base model.

    Raises:
        InstructGPTError: if there is none, or one that transformers does not know.
    """
    if is_adapter(folder):
        folder = adapter_base(folder)
    with loading_errors(f"{folder}: no model config could be loaded"):
        return AutoConfig.from_pretrained(folder)


def positions(config: PreTrainedConfig) -> int | None:
    """Longest sequence of a model in tokens; None where its config states no limit, or a scaled one."""
    text = config.get_text_config()
    rope, limit = getattr(text, "rope_parameters", None) or {}, getattr(text, "max_position_embeddings", None)
    kinds = [rope] if "rope_type" in rope else [item for item in rope.values() if isinstance(item, dict)]
    scaled = any(item.get("rope_type", "default") != "default" for item in kinds)
    return limit if isinstance(limit, int) and limit > 0 and not scaled else None


def load_policy(
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    peft_config: LoraConfig | None = None,
    config: PreTrainedConfig | None = None,
    trainable: bool = True,
    **model_kwargs: Any,
) -> PreTrainedModel | PeftModel:
    """Load a causal language model, ready to train.

    Args:
        folder: whole model, or an adapter that is trained further.
        tokenizer: its padding id becomes the model's; the embeddings grow if it has more tokens than they have rows.
        peft_config: wraps a whole model in a fresh adapter; ignored for an adapter folder.
        config: in place of the model's own config (residual dropout).
        trainable: False freezes an adapter.
        model_kwargs: for `from_pretrained`: dtype, attn_implementation, quantization_config.

    Raises:
        InstructGPTError: if the folder holds no causal language model.
    """
    adapter = adapter_config(Path(folder)) if is_adapter(Path(folder)) else None
    whole = absolute_source(folder) if adapter is None else str(adapter.base_model_name_or_path)
    with loading_errors(f"{whole}: the model cannot be loaded"):
        model = AutoModelForCausalLM.from_pretrained(whole, config=config, **model_kwargs)
    grow_embeddings(model, len(tokenizer))
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(folder), config=adapter, is_trainable=trainable)
    elif peft_config is not None:
        model = get_peft_model(model, peft_config)
    restore_cpu_gradients(model)
    set_policy_tokens(model, tokenizer)
    return model


def set_policy_tokens(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a policy pad and end its completions with the tokenizer's tokens, and make its settings fit to be saved."""
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # Some models declare more EOS tokens than the one that ends every demonstration and ranked completion.
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    dropped = settle_generation_config(model.generation_config)
    if dropped:
        logger.warning(
            "generation_config: dropped %s, which %s no effect beside the model's other settings of generation.",
            ", ".join(f"{name}={value!r}" for name, value in dropped.items()),
            "has" if len(dropped) == 1 else "have",
        )


def settle_generation_config(config: GenerationConfig) -> dict[str, Any]:
    """Unset every setting that contradicts the others; return what was unset.

    Published models have such settings, `temperature` without `do_sample` for one. transformers ignores them with a
    warning when it generates, and refuses to save them once anything in the config has changed.
    """
    if _can_be_saved(config):
        return {}
    dropped, settled, unset = {}, GenerationConfig(), vars(GenerationConfig())
    for name in sorted(unset, key=lambda name: name not in _GENERATION_MODES):
        value = getattr(config, name)
        setattr(settled, name, value)
        if not _can_be_saved(settled):
            dropped[name] = value
            setattr(settled, name, unset[name])
            setattr(config, name, unset[name])
    return dropped


def _can_be_saved(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


def grow_embeddings(model: PreTrainedModel, tokens: int) -> None:
    """Resize the embeddings to `tokens` rows if they have fewer."""
    if tokens > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(tokens)


def keep_half(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Store the linear layers of a frozen float32 model in half precision.

    Autocast in `dtype`, bfloat16 or float16, rounds exactly these weights in every forward pass, so results under it
    stay the same bit for bit. Embeddings, norms, subclasses of `nn.Linear` and tied weights keep their dtype.
    """
    tied = {id(item.weight) for item in model.modules() if isinstance(item, torch.nn.Embedding)}
    halved = {
        id(parameter)
        for module in model.modules()
        if type(module) in (torch.nn.Linear, Conv1D) and id(module.weight) not in tied
        for parameter in module.parameters(recurse=False)
        if parameter.dtype == torch.float32
    }
    if not halved:
        return
    for parameter in model.parameters():
        if id(parameter) in halved:
            parameter.data = parameter.data.to(dtype)
        elif parameter.device.type == "cpu" and parameter.is_floating_point():
            # Loaded weights may be views of the memory-mapped file; one such view keeps the whole file in memory.
            parameter.data = parameter.data.clone()


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Numbers of parameters and of trainable ones, without the adapters of other roles on the same base."""
    own = [item for name, item in model.named_parameters() if adapter_of(name) == POLICY_ADAPTER]
    return {
        "parameters": sum(item.numel() for item in own),
        "trainable_parameters": sum(item.numel() for item in own if item.requires_grad),
    }
