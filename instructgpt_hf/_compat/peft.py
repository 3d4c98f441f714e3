"""Which adapters the layers of a PEFT model apply."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

REFERENCE_ADAPTER = "ref"


# What a layer of PEFT reads, in every forward pass, to know which adapters to apply: a name or a list of names.
ADAPTER_CHOICE = "_active_adapter"


ADAPTED = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def adapter_layers(model: Any) -> list[Any]:
    """The layers of a PEFT model that carry adapters, or a whole module of each adapter's own (`modules_to_save`)."""
    names = tuple(model.peft_config)
    kept = model.__dict__.get("_instructgpt_adapter_layers")
    if kept is None or kept[0] != names:  # another adapter may have wrapped more layers
        kept = names, [module for module in model.modules() if isinstance(module, ADAPTED)]
        model.__dict__["_instructgpt_adapter_layers"] = kept
    return kept[1]


def applied_adapters(layers: list[Any]) -> list[str]:
    """Names of the adapters that the layers apply; it is the same in all of them."""
    return list(layers[0].active_adapters)


def apply_adapters(layers: list[Any], names: list[str]) -> None:
    """Choose the adapters of the layers, and leave alone which weights are trained."""
    for layer in layers:
        setattr(layer, ADAPTER_CHOICE, names)


def unwrap_peft(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
