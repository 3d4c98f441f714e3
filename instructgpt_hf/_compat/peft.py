"""The choice of the adapters that the layers of a PEFT model apply, without a change of what is trained."""

from __future__ import annotations

from typing import TypeAlias

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel

# TRL's name for the copy of a PEFT policy's adapter that is the KL reference.
REFERENCE_ADAPTER = "ref"
AdapterLayer: TypeAlias = BaseTunerLayer | AuxiliaryTrainingWrapper


def adapter_layers(model: PeftModel) -> list[AdapterLayer]:
    """The layers of a PEFT model with adapters or `modules_to_save`; kept on the model, as they are needed often."""
    names, kept = tuple(model.peft_config), vars(model).setdefault("_instructgpt_adapter_layers", {})
    if names not in kept:  # another adapter may have wrapped more layers
        kept.clear()
        kept[names] = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    return kept[names]


def applied_adapters(layers: list[AdapterLayer]) -> list[str]:
    """Names of the adapters that the layers apply, the same in all of them."""
    return list(layers[0].active_adapters)


def apply_adapters(layers: list[AdapterLayer], names: list[str]) -> None:
    """Choose the adapters of the layers; an empty list leaves the base alone.

    Cause: PEFT's `set_adapter` also makes the chosen adapter the only trained one, so a switch between forward and
        backward pass silently loses the gradients of others.
    Goes when: PEFT can choose adapters, or none, without touching `requires_grad`.
    Relies on: the layers reading `_active_adapter`, a name or a list of names, in every forward pass.
    """
    for layer in layers:
        layer._active_adapter = names


def unwrap_peft(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def freeze_reference_adapter(policy: PreTrainedModel | PeftModel) -> None:
    """Freeze the adapter "ref" that TRL adds to a PEFT policy, as an exact copy of the policy's start.

    Cause: `RLOOTrainer` copies the adapter "default" to "ref" and then rounds the trained weights of a quantised
        model, "ref" among them, to bfloat16: the first KL would not be 0.
    Goes when: TRL adds "ref" frozen and in the precision of "default".
    Relies on: the name "ref" and parameters that differ in it alone.
    """
    for name, parameter in policy.named_parameters():
        if f".{REFERENCE_ADAPTER}." in name:
            parameter.requires_grad_(False)
            parameter.data = policy.get_parameter(name.replace(f".{REFERENCE_ADAPTER}.", ".default.")).data.clone()
