"""The reward model: the SFT model with a scalar head in place of its unembedding (InstructGPT §3.5).

It is transformers' own `...ForSequenceClassification` with one label, so plain `AutoModelForSequenceClassification`
loads it. The score is read at the completion's EOS token, the last token before the padding. `config.reward_shift`
is the mean score of demonstrations; subtracting it gives scores whose mean on demonstrations is 0.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers import AutoQuantizationConfig

from instructgpt_hf._compat.peft import unwrap_peft
from instructgpt_hf._compat.quirks import restore_cpu_gradients, take_quantization
from instructgpt_hf.errors import InstructGPTError, loading_errors
from instructgpt_hf.models.adapters import POLICY_ADAPTER, adapter_of, using_adapter
from instructgpt_hf.models.inputs import evaluation_mode
from instructgpt_hf.models.loading import absolute_source, adapter_config, grow_embeddings, load_config
from instructgpt_hf.models.origins import adapter_base, is_adapter, resolve_source

HEAD = "score"
# The head's weight in an adapter's file.
HEAD_KEY = f"base_model.model.{HEAD}.weight"
# Key of the classifier's config in an adapter folder for the quantisation of the base in training.
BASE_QUANTIZATION = "base_quantization"
# Subfolder of an adapter folder for the classifier's config. A config.json beside adapter_config.json would make
# transformers look for whole weights there.
CLASSIFIER_FOLDER = "classifier"


class ScoreHead(nn.Linear):
    """The scalar head, computed in float32 whatever the dtype of model and autocast.

    Scores of several units are multiples of 1/32 in bfloat16, more than many completions differ by.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """Scores [..., 1] in float32 of hidden states [..., d]."""
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(hidden.device.type, enabled=False):
            return functional.linear(hidden.float(), self.weight.float(), bias)


def head_scores(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Raw scores [...] in float32 of hidden states [..., d] by any classifier's scalar head."""
    # Outside autocast: a scalar of several units loses a tenth of one in bfloat16.
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.to(head.weight.dtype)).squeeze(-1).float()


class AdapterScorer(nn.Module):
    """A reward or value model made of one adapter of a PEFT model and a scalar head.

    It has the parts of a sequence classifier that the package uses: `config`, the head `score`, and the backbone under
    `base_model_prefix`. `parameters()` are those of its adapter and its head only.

    Args:
        host: PEFT model that holds the base and the adapter.
        adapter: name of the adapter; None uses the base alone.
        weight: [1, d] of the head, copied in float32.
        config: config of the sequence classifier with `reward_shift`, copied.
        owns_host: register the host's weights as this module's; False where another module registers them.
    """

    base_model_prefix = "backbone"

    def __init__(
        self, host: PeftModel, adapter: str | None, weight: Tensor, config: PreTrainedConfig, owns_host: bool = False
    ) -> None:
        super().__init__()
        self.score = ScoreHead(weight.shape[1], 1, bias=False, device=next(host.parameters()).device)
        with torch.no_grad():
            self.score.weight.copy_(weight)
        self.adapter, self.config = adapter, copy.deepcopy(config)
        if owns_host:
            self.host = host
        else:
            self.__dict__["host"] = host

    def backbone(self, **inputs: Any) -> Any:
        """The base's final hidden states [B, S, d] under this adapter; a frozen role's without the host's dropout."""
        inner = unwrap_peft(self.host)
        frozen = self.host.training and not self.training
        mode = evaluation_mode(self.host) if frozen else contextlib.nullcontext()
        with using_adapter(self.host, self.adapter), mode:
            return getattr(inner, inner.base_model_prefix)(**inputs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Raw scores [B, S] at every position, without the shift."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return head_scores(self.score, hidden)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of this role's adapter and head."""
        yield from self.score.named_parameters(prefix=HEAD)
        for name, parameter in self.host.named_parameters():
            if self.adapter is not None and adapter_of(name) == self.adapter:
                yield name, parameter

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter so that `load_reward_model` and plain transformers load it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        adapter = self.adapter or POLICY_ADAPTER
        weights = get_peft_model_state_dict(self.host, adapter_name=adapter, save_embedding_layers=False)
        weights[HEAD_KEY] = self.score.weight
        tensors = {name: item.detach().cpu().contiguous() for name, item in weights.items()}
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config = copy.deepcopy(self.host.peft_config[adapter])
        config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", [HEAD], True
        config.save_pretrained(str(folder))
        self.config.save_pretrained(folder / CLASSIFIER_FOLDER)


Scorer: TypeAlias = PreTrainedModel | PeftModel | AdapterScorer


def create_reward_model(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    peft_config: LoraConfig | None = None,
    **model_kwargs: Any,
) -> PreTrainedModel | PeftModel:
    """A reward model that starts from an SFT model, with a fresh head.

    The head's weight is drawn from N(0, 1/(d+1)) for hidden size d (Stiennon et al. 2020, §3.4; InstructGPT does not
    state it). An SFT adapter becomes the start of the reward adapter, and the head is among the modules it saves.

    Args:
        folder: the SFT model, whole or adapter.
        tokenizer: the SFT tokenizer; its padding token differs from EOS.
        seed: seed of the head's weight.
        peft_config: wraps a whole SFT model in a fresh adapter; ignored for an adapter folder.
        model_kwargs: for `from_pretrained`.

    Raises:
        InstructGPTError: if the architecture has no sequence classifier with a `score` head.
    """
    continues = is_adapter(folder)
    model = _load_classifier(adapter_base(folder) if continues else resolve_source(str(folder)), **model_kwargs)
    grow_embeddings(model, len(tokenizer))
    text_config = model.config.get_text_config()
    text_config.pad_token_id, text_config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    model.config.reward_shift = 0.0
    adapter = adapter_config(folder) if continues else peft_config
    if adapter is not None:
        # Updates of the head are smaller than half a step of bfloat16.
        getattr(model, HEAD).float()
    init_head(model, seed)
    if adapter is None:
        return model
    model = get_peft_model(model, with_head(adapter))
    if continues:
        weights = load_peft_weights(str(folder), device="cpu")
        # PEFT requires the head's weight too, because the head is among `modules_to_save`.
        weights[HEAD_KEY] = getattr(unwrap_peft(model), HEAD).weight.detach()
        set_peft_model_state_dict(model, weights)
    return model


def with_head(adapter: PeftConfig) -> PeftConfig:
    """A copy of an adapter's config for a reward model: the head is trained, and saved with the adapter."""
    adapter = copy.deepcopy(adapter)
    adapter.task_type, adapter.inference_mode = "SEQ_CLS", False
    adapter.modules_to_save = sorted({*(adapter.modules_to_save or []), HEAD})
    return adapter


def holds_reward_model(folder: Path) -> bool:
    """Whether a model folder holds a sequence classifier or an adapter of one, so that it has a head already."""
    if is_adapter(folder):
        return (folder / CLASSIFIER_FOLDER).is_dir()
    names = load_config(folder).architectures or ()
    return any(name.endswith("ForSequenceClassification") for name in names)


def save_reward_model(model: Scorer, folder: Path) -> None:
    """Write a reward or value model so that `load_reward_model` and plain transformers load it."""
    model.save_pretrained(folder)
    save_classifier_record(model, folder)


def save_classifier_record(model: Scorer, folder: Path) -> None:
    """Write what an adapter's own files lack: the classifier's config in `classifier/`.

    It holds the shift, the padding token, the dtype and, as `base_quantization`, the quantisation of the base.
    """
    if isinstance(model, PeftModel):
        classifier_record(unwrap_peft(model)).save_pretrained(folder / CLASSIFIER_FOLDER)


def classifier_record(classifier: PreTrainedModel) -> PreTrainedConfig:
    """The classifier's config as an adapter's folder keeps it."""
    config = copy.deepcopy(classifier.config)
    config.architectures = [type(classifier).__name__]
    quantization = take_quantization(config, classifier)
    if quantization is not None:
        setattr(config, BASE_QUANTIZATION, quantization)
    return config


def load_reward_model(
    source: str | Path, *, trainable: bool = False, **model_kwargs: Any
) -> PreTrainedModel | PeftModel:
    """Load a trained reward model (or value model) from a local folder or Hub id.

    An adapter's base is loaded with the dtype and quantisation of its training, so that scores are those of training.

    Args:
        source: folder or Hub id that the reward stage wrote, whole or adapter.
        trainable: leave the parameters trainable, to start a value model.
        model_kwargs: for `from_pretrained`; they win over both, and `quantization_config=None` loads an unquantised
            base.

    Raises:
        InstructGPTError: if the model is missing or has no scalar head.
    """
    folder = resolve_source(str(source), role="reward model")
    if is_adapter(folder):
        base = load_adapter_classifier(folder, **model_kwargs)
        return PeftModel.from_pretrained(
            base, str(folder), config=adapter_config(folder), is_trainable=trainable
        ).eval()
    model = _load_classifier(folder, **model_kwargs)
    return (model if trainable else model.requires_grad_(False)).eval()


def load_adapter_classifier(folder: Path, **model_kwargs: Any) -> PreTrainedModel:
    """Load the classifier of the adapter in `folder`, without the adapter, as it was when the adapter was trained.

    `model_kwargs` for `from_pretrained` win over the folder's record.

    Raises:
        InstructGPTError: if the record in `classifier/` or the base model is missing.
    """
    saved = load_classifier_config(folder)
    model_kwargs.setdefault("dtype", saved.dtype or "auto")
    quantization = getattr(saved, BASE_QUANTIZATION, None)
    if quantization is not None:
        model_kwargs.setdefault("quantization_config", AutoQuantizationConfig.from_dict(quantization))
    base = _load_classifier(adapter_base(folder), **model_kwargs)
    getattr(base, HEAD).float()
    grow_embeddings(base, saved.get_text_config().vocab_size)
    names = ("reward_shift", "pad_token_id", "eos_token_id")
    base.config.update({name: getattr(saved, name) for name in names if hasattr(saved, name)})
    return base


def load_classifier_config(folder: Path) -> PreTrainedConfig:
    """The classifier's config in the folder of a reward or value adapter.

    Raises:
        InstructGPTError: if it is missing.
    """
    with loading_errors(f"{folder}: {CLASSIFIER_FOLDER}/config.json with the reward model's shift is missing"):
        return AutoConfig.from_pretrained(folder / CLASSIFIER_FOLDER)


def _load_classifier(folder: Path, **model_kwargs: Any) -> PreTrainedModel:
    quantization = model_kwargs.get("quantization_config")
    if quantization is not None and getattr(quantization, "llm_int8_skip_modules", None) is None:
        # A copy, because the same settings also load causal models, which keep other modules unquantised.
        model_kwargs["quantization_config"] = quantization = copy.deepcopy(quantization)
        quantization.llm_int8_skip_modules = [HEAD]
    unknown = f"{folder}: transformers has no sequence classifier for this architecture"
    unfit = f"{folder}: cannot be loaded with one score"
    with loading_errors(unfit, OSError, RuntimeError), loading_errors(unknown, ValueError):
        source = absolute_source(folder)
        model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, **model_kwargs)
    with loading_errors(str(folder), InstructGPTError):
        scalar_head(model)
    restore_cpu_gradients(model)
    return model


def scalar_head(model: PreTrainedModel) -> ScoreHead:
    """The head of a sequence classifier, which from then on computes in float32.

    Raises:
        InstructGPTError: if it is none with one score.
    """
    head: Any = getattr(model, HEAD, None)
    # A subclass may be a quantised layer, if the base's file already holds quantised weights.
    if type(head) not in (nn.Linear, ScoreHead) or head.out_features != 1:
        raise InstructGPTError(f"{type(model).__name__} has no plain scalar `{HEAD}` head.")
    head.__class__ = ScoreHead  # in place, so that its weight, name and hooks stay
    return head  # type: ignore[no-any-return]


def init_head(model: Scorer, seed: int) -> None:
    """Draw the head's weight from N(0, 1/(d+1)) for hidden size d (Stiennon et al. 2020, §3.4)."""
    weight = getattr(model, HEAD).weight
    values = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) / math.sqrt(weight.shape[1] + 1)
    with torch.no_grad():
        weight.copy_(values.to(weight))
