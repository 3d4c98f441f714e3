"""The reward model: the SFT model with a scalar head in place of its unembedding (InstructGPT §3.5).

It is transformers' own `...ForSequenceClassification` with one label, so plain `AutoModelForSequenceClassification`
loads it. The score is read at the completion's EOS token, the last real token of the sequence. `config.reward_shift`
is the mean score of demonstrations; subtracting it gives scores whose mean on demonstrations is 0.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.quantizers import AutoQuantizationConfig

from instructgpt_hf._compat.peft import unwrap_peft
from instructgpt_hf._compat.quirks import restore_cpu_gradients
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.models.loading import adapter_base, grow_embeddings, is_adapter, resolve_source

HEAD = "score"
# In the classifier's config of an adapter folder: how the base was quantised when the adapter was trained on it.
BASE_QUANTIZATION = "base_quantization"
# Of an adapter folder. A config.json beside adapter_config.json would make transformers look for whole weights there.
CLASSIFIER_FOLDER = "classifier"


class ScoreHead(torch.nn.Linear):
    """The scalar head, in float32 whatever the model and autocast compute in.

    A score of several units in bfloat16 is a multiple of 1/32, more than two answers often differ by.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores [..., 1] in float32 of hidden states [..., d]."""
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(hidden.device.type, enabled=False):
            return functional.linear(hidden.float(), self.weight.float(), bias)


def create_reward_model(
    folder: Path, tokenizer: Any, *, seed: int, peft_config: LoraConfig | None = None, **model_kwargs: Any
) -> Any:
    """A reward model that starts from an SFT model, with a fresh head.

    The head's weight is drawn from N(0, 1/(d+1)) for hidden size d (Stiennon et al. 2020, §3.4; InstructGPT does not
    state it). An SFT adapter becomes the start of the reward adapter, and the head is among the modules it saves.

    Args:
        folder: the SFT model, whole or adapter.
        tokenizer: the SFT tokenizer; its padding token differs from EOS.
        seed: of the head.
        peft_config: wraps a whole SFT model in a fresh adapter; ignored for an adapter folder.
        model_kwargs: for `from_pretrained`.

    Raises:
        InstructGPTError: if the architecture has no sequence classifier with a `score` head.
    """
    continues = is_adapter(folder)
    source, revision = adapter_base(folder) if continues else (str(folder), None)
    model = _load_classifier(resolve_source(source, revision, "base model of the adapter"), **model_kwargs)
    adapter = PeftConfig.from_pretrained(folder) if continues else peft_config
    if adapter is not None:
        # Few weights, with updates smaller than half a step of bfloat16.
        getattr(model, HEAD).float()
    _set_tokens(model, tokenizer)
    _init_head(model, seed)
    if adapter is not None:
        adapter.task_type = "SEQ_CLS"
        adapter.modules_to_save = _with_head(adapter.modules_to_save)
        adapter.inference_mode = False
        model = get_peft_model(model, adapter)
    if continues:
        _copy_adapter(folder, model)
    return model


def _with_head(modules: list[str] | None) -> list[str]:
    return sorted({*(modules or []), HEAD})


def _copy_adapter(folder: Path, model: Any) -> None:
    """Copy an SFT adapter's weights into the reward adapter, whose head stays as it is."""
    weights = load_peft_weights(str(folder), device="cpu")
    # The head is among the modules that the reward adapter saves, so PEFT asks for its weight too.
    weights[f"base_model.model.{HEAD}.weight"] = getattr(unwrap_peft(model), HEAD).weight.detach()
    set_peft_model_state_dict(model, weights)


def save_reward_model(model: Any, folder: Path) -> None:
    """Write a reward or value model so that `load_reward_model` and plain transformers load it.

    An adapter's folder also gets the classifier's config in `classifier/`. It holds the shift, the padding token, the
    dtype, and as `base_quantization` how the base was quantised.
    """
    model.save_pretrained(folder)
    if not isinstance(model, PeftModel):
        return
    classifier_record(unwrap_peft(model)).save_pretrained(folder / CLASSIFIER_FOLDER)


def classifier_record(classifier: Any) -> Any:
    """The config that an adapter's folder keeps of its classifier."""
    config = copy.deepcopy(classifier.config)
    config.architectures = [type(classifier).__name__]
    quantizer = getattr(classifier, "hf_quantizer", None)
    if quantizer is not None and not quantizer.pre_quantized:
        # As `quantization_config` it would say that the base's file holds quantised weights.
        setattr(config, BASE_QUANTIZATION, config.quantization_config.to_dict())
        del config.quantization_config
    return config


def load_reward_model(source: str | Path, *, trainable: bool = False, **model_kwargs: Any) -> Any:
    """A trained reward model (or value model) from a local folder or Hub id.

    An adapter's base is loaded in the dtype and with the quantisation it had in training, so that the scores are those
    of training, unless `model_kwargs` say otherwise; `quantization_config=None` loads it unquantised.

    Args:
        source: folder or Hub id that the reward stage wrote, whole or adapter.
        trainable: leave its parameters trainable, to start a value model from it.
        model_kwargs: for `from_pretrained`.

    Raises:
        InstructGPTError: if it is missing or has no scalar head.
    """
    folder = resolve_source(str(source), role="reward model")
    if is_adapter(folder):
        base = load_adapter_classifier(folder, **model_kwargs)
        model = PeftModel.from_pretrained(base, str(folder), is_trainable=trainable)
    else:
        model = _load_classifier(folder, **model_kwargs)
        if not trainable:
            model.requires_grad_(False)
    return model.eval()


def load_adapter_classifier(folder: Path, **model_kwargs: Any) -> Any:
    """The classifier that the adapter in `folder` belongs to, without it, as it was when the adapter was trained.

    Args:
        folder: adapter of a reward or value model.
        model_kwargs: for `from_pretrained`; they win over what the folder records.

    Raises:
        InstructGPTError: if the record in `classifier/` or the base model is missing.
    """
    saved = load_classifier_config(folder)
    model_kwargs.setdefault("dtype", saved.dtype or "auto")
    quantization = getattr(saved, BASE_QUANTIZATION, None)
    if quantization is not None:
        model_kwargs.setdefault("quantization_config", AutoQuantizationConfig.from_dict(quantization))
    source, revision = adapter_base(folder)
    base = _load_classifier(resolve_source(source, revision, "base model of the adapter"), **model_kwargs)
    getattr(base, HEAD).float()
    grow_embeddings(base, saved.get_text_config().vocab_size)
    for name in ("reward_shift", "pad_token_id", "eos_token_id"):
        if hasattr(saved, name):
            setattr(base.config, name, getattr(saved, name))
    return base


def load_classifier_config(folder: Path) -> Any:
    """The classifier's config that the folder of a reward or value adapter holds.

    Raises:
        InstructGPTError: if it is missing.
    """
    try:
        return AutoConfig.from_pretrained(folder / CLASSIFIER_FOLDER)
    except (OSError, ValueError):
        raise InstructGPTError(
            f"{folder}: {CLASSIFIER_FOLDER}/config.json with the reward model's shift is missing."
        ) from None


def _load_classifier(folder: Path, **model_kwargs: Any) -> Any:
    quantization = model_kwargs.get("quantization_config")
    if quantization is not None and getattr(quantization, "llm_int8_skip_modules", None) is None:
        # A copy: the same settings also load models that keep their own unquantised modules.
        quantization = copy.deepcopy(quantization)
        quantization.llm_int8_skip_modules = [HEAD]
        model_kwargs["quantization_config"] = quantization
    try:
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, **model_kwargs)
    except ValueError as error:
        raise InstructGPTError(
            f"{folder}: transformers has no sequence classifier for this architecture: {str(error).splitlines()[0]}"
        ) from error
    except (OSError, RuntimeError) as error:
        raise InstructGPTError(f"{folder}: cannot be loaded with one score: {str(error).splitlines()[0]}") from error
    head = getattr(model, HEAD, None)
    # A subclass may be a quantised layer, where the file of the base already holds quantised weights.
    if type(head) is not torch.nn.Linear or head.out_features != 1:
        raise InstructGPTError(f"{folder}: {type(model).__name__} has no plain scalar `{HEAD}` head.")
    # Its weights and their names stay.
    head.__class__ = ScoreHead
    restore_cpu_gradients(model)
    return model


def _set_tokens(model: Any, tokenizer: Any) -> None:
    grow_embeddings(model, len(tokenizer))
    text_config = model.config.get_text_config()
    text_config.pad_token_id = tokenizer.pad_token_id
    text_config.eos_token_id = tokenizer.eos_token_id
    model.config.reward_shift = 0.0


def _init_head(model: Any, seed: int) -> None:
    weight = getattr(model, HEAD).weight
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[1] + 1)
    with torch.no_grad():
        weight.copy_(values.to(weight))
