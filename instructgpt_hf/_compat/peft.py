"""The choice of the adapters that the layers of a PEFT model apply; training stays as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeAlias

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel

# TRL's name for the copy of a PEFT policy's adapter that is the KL reference.
REFERENCE_ADAPTER = "ref"

# What a layer of PEFT reads in every forward pass to know which adapters to apply: a name or a list of names.
ADAPTER_CHOICE = "_active_adapter"

AdapterLayer: TypeAlias = BaseTunerLayer | AuxiliaryTrainingWrapper


def adapter_layers(model: PeftModel) -> list[AdapterLayer]:
    """The layers of a PEFT model that carry adapters, or a whole module of each adapter's own (`modules_to_save`).

    The list is kept on the model, because adapters are switched several times per forward pass of a large model.
    """
    names = tuple(model.peft_config)
    kept = model.__dict__.get("_instructgpt_adapter_layers")
    if kept is None or kept[0] != names:  # another adapter may have wrapped more layers
        kept = names, [module for module in model.modules() if isinstance(module, AdapterLayer)]
        model.__dict__["_instructgpt_adapter_layers"] = kept
    return kept[1]


def applied_adapters(layers: list[AdapterLayer]) -> list[str]:
    """Names of the adapters that the layers apply, the same in all of them."""
    return list(layers[0].active_adapters)


def apply_adapters(layers: list[AdapterLayer], names: list[str]) -> None:
    """Choose the adapters of the layers; an empty list leaves the base alone.

    Cause: PEFT's `set_adapter` also makes the chosen adapter the only trained one, so with several trained adapters a
        switch between forward and backward pass silently loses gradients.
    Goes when: PEFT can choose adapters without touching `requires_grad`, an empty choice included.
    Relies on: the layers reading `_active_adapter` in every forward pass.
    """
    for layer in layers:
        setattr(layer, ADAPTER_CHOICE, names)


@contextlib.contextmanager
def keep_trainable(model: PeftModel) -> Iterator[None]:
    """Keep every `requires_grad` while an adapter is added in this block; the new adapter is frozen.

    Cause: PEFT 0.20 freezes every adapter that is not the active one when it adds another.
    Goes when: the lower bound of PEFT is 0.21, which freezes only the adapter that it adds.
    Relies on: parameters keeping their names.
    """
    trained = {name for name, item in model.named_parameters() if item.requires_grad}
    yield
    for name, item in model.named_parameters():
        item.requires_grad_(name in trained)


def unwrap_peft(model: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
