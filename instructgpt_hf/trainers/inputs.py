"""What people who know TRL hand to a trainer: model ids or objects, tokenizers, settings, names of prompt formats."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from instructgpt_hf._compat.peft import unwrap_peft
from instructgpt_hf.artifacts import STAGE_FILE, StageArtifact
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.models.loading import (
    grow_embeddings,
    load_config,
    load_policy,
    load_tokenizer,
    settle_generation_config,
    settle_special_tokens,
)
from instructgpt_hf.models.origins import base_model_folder, is_adapter
from instructgpt_hf.models.reward_model import (
    HEAD,
    create_reward_model,
    holds_reward_model,
    load_reward_model,
    with_head,
)

logger = logging.getLogger(__name__)

Args = TypeVar("Args", bound=TrainingArguments)
Policy: TypeAlias = PreTrainedModel | PeftModel


def settled_args(args: Any, kind: type[Args], model: Any, suffix: str, **defaults: Any) -> Args:
    """`args`, or by default the settings of `kind` with `<name of the model>-<suffix>` as output folder.

    Raises:
        InstructGPTError: if they are settings of another trainer, whose defaults are not the paper's.
    """
    if args is None:
        name = model if isinstance(model, str) else getattr(model, "name_or_path", "") or "model"
        return kind(f"{Path(name).name}-{suffix}", **defaults)
    if not isinstance(args, kind):
        raise InstructGPTError(
            f"args: is a {type(args).__module__.split('.')[0]} {type(args).__name__}; this trainer takes "
            f"instructgpt_hf.{kind.__name__}, which has the same settings and more."
        )
    return args


def refuse(given: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """Raise for arguments that other trainers take and this one cannot use.

    Raises:
        InstructGPTError: naming the argument and what to do instead.
    """
    for name, reason in reasons.items():
        if given.get(name) is not None:
            raise InstructGPTError(f"{name}: {reason}")


class ModelSource:
    """A model by its name, or in memory: what can be known of it before its weights are loaded.

    Args:
        model: Hub id, folder, `"lab"`, or a model in memory.
        args: of the trainer; `model_init_kwargs` and `trust_remote_code` are for `from_pretrained`.
        quantization_config: of the base, for a model by its name.

    Attributes:
        folder: where a model by its name lies; None for one in memory.
        options: keyword arguments of `from_pretrained`.
    """

    def __init__(self, model: str | Path | Policy, args: Any, quantization_config: Any = None) -> None:
        self.folder: Path | None = None
        self.model: Any = model
        self.options: dict[str, Any] = {"dtype": "float32", **(args.model_init_kwargs or {})}
        if isinstance(self.options["dtype"], str) and self.options["dtype"] != "auto":
            self.options["dtype"] = getattr(torch, self.options["dtype"])
        if args.trust_remote_code:
            self.options["trust_remote_code"] = True
        self.revision = self.options.pop("revision", None)
        if isinstance(model, (str, Path)):
            self.folder = base_model_folder(str(model), self.revision, "model")
            if quantization_config is not None:
                device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
                self.options |= {"quantization_config": quantization_config, "device_map": {"": device}}
        elif quantization_config is not None:
            raise InstructGPTError("quantization_config: the model is loaded already; pass its id to quantise it.")

    @property
    def config(self) -> PreTrainedConfig:
        """The model's config, an adapter's base's."""
        return load_config(self.folder) if self.folder is not None else unwrap_peft(self.model).config

    def tokenizer(self, given: Any) -> PreTrainedTokenizerBase:
        """The tokenizer given, or the model's own, with a padding token that differs from EOS.

        Raises:
            InstructGPTError: if it is not a tokenizer, or the model in memory does not say where it comes from.
        """
        if given is not None:
            tokenizer = getattr(given, "tokenizer", given)  # a processor's
            if not isinstance(tokenizer, PreTrainedTokenizerBase):
                raise InstructGPTError(f"processing_class: is a {type(given).__name__}, not a tokenizer.")
            settle_special_tokens(tokenizer, "processing_class")
            return tokenizer
        if self.folder is not None:
            return load_tokenizer(self.folder)
        name = getattr(unwrap_peft(self.model), "name_or_path", "")
        if not name:
            raise InstructGPTError(
                "processing_class: the model was not loaded from a folder or the Hub, so its tokenizer is not known; "
                "pass the tokenizer."
            )
        return load_tokenizer(base_model_folder(name, None, "processing_class"))

    def adapter(self, peft_config: PeftConfig | None, task_type: str) -> PeftConfig | None:
        """A copy of `peft_config` for a task; raises InstructGPTError if the model has an adapter already."""
        if peft_config is None:
            return None
        if isinstance(self.model, PeftModel) or (self.folder is not None and is_adapter(self.folder)):
            raise InstructGPTError(
                "peft_config: the model has an adapter already, which is trained further; leave peft_config out, or "
                "merge the adapter first (`instructgpt-hf merge`)."
            )
        peft_config = copy.deepcopy(peft_config)
        peft_config.task_type = task_type
        return peft_config

    def policy(
        self,
        tokenizer: PreTrainedTokenizerBase,
        peft_config: LoraConfig | None = None,
        config: PreTrainedConfig | None = None,
    ) -> Policy:
        """The causal language model, ready to train; the arguments are those of `models.loading.load_policy`."""
        adapter = self.adapter(peft_config, "CAUSAL_LM")
        if self.folder is not None:
            return load_policy(self.folder, tokenizer, peft_config=adapter, config=config, **self.options)
        if self.model.get_output_embeddings() is None:
            raise InstructGPTError(f"model: {_name(self.model)} is no causal language model.")
        _fit_embeddings(self.model, tokenizer)
        model = self.model if adapter is None else get_peft_model(self.model, adapter)
        settle_generation_config(model.generation_config)  # or it could not be saved after training
        return model

    def classifier(
        self, tokenizer: PreTrainedTokenizerBase, seed: int, peft_config: LoraConfig | None = None
    ) -> PreTrainedModel | PeftModel:
        """The reward model, ready to train: a finished one is trained further, another model gets a fresh head."""
        adapter = self.adapter(peft_config, "SEQ_CLS")
        if self.folder is None:
            inner = unwrap_peft(self.model)
            if not hasattr(inner, HEAD) or inner.config.num_labels != 1:
                raise InstructGPTError(
                    f"model: {_name(self.model)} is no sequence classifier with one label and a `{HEAD}` head. Pass "
                    "the model's id, or AutoModelForSequenceClassification.from_pretrained(id, num_labels=1)."
                )
            _fit_embeddings(self.model, tokenizer)
            return self.model if adapter is None else get_peft_model(self.model, with_head(adapter))
        if not holds_reward_model(self.folder):
            return create_reward_model(self.folder, tokenizer, seed=seed, peft_config=adapter, **self.options)
        model = load_reward_model(self.folder, trainable=True, **self.options)
        return model if adapter is None else get_peft_model(model, with_head(adapter))


def chosen_format(
    given: PromptFormat | str | None, tokenizer: PreTrainedTokenizerBase, folder: Path | None = None
) -> PromptFormat:
    """The prompt format given, or by name, or by default: the one recorded in the model's folder, the tokenizer's
    chat template, or without one the prompt as it is (`raw`)."""
    if given is not None and not isinstance(given, str):
        return given
    recorded = recorded_format(folder) if given is None else None
    if recorded is not None:
        return recorded
    return PromptFormat.create(given or ("chat" if tokenizer.chat_template else "raw"), tokenizer)


def recorded_format(folder: Path | None) -> PromptFormat | None:
    """The prompt format in the `stage.json` of a model's folder, if it has one."""
    if folder is None or not (folder / STAGE_FILE).is_file():
        return None
    return PromptFormat.from_dict(StageArtifact.load(folder).prompt_format)


def _fit_embeddings(model: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a model in memory a row for every token, as loading it by its name does."""
    rows = model.get_input_embeddings().num_embeddings
    if isinstance(model, PeftModel) and len(tokenizer) > rows:
        raise InstructGPTError(
            f"processing_class: has {len(tokenizer)} tokens and the model {rows} embeddings. Resize the embeddings "
            "before the adapter is put on, or choose a padding token among the tokens that the model knows."
        )
    grow_embeddings(model, len(tokenizer))


def _name(model: Any) -> str:
    return type(unwrap_peft(model)).__name__
