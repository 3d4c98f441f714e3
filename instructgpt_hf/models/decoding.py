"""Generation that spends no forward pass on completions that have ended.

transformers' `generate` keeps every row of a batch, padded, until its last row ends. The loop here, which `generate`
runs in place of its own, takes ended rows out of the batch and of the key-value cache.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerationMode, logits_process

from instructgpt_hf._compat.quirks import cache_name, call_settings_only, has_sharded_weights, next_inputs
from instructgpt_hf.errors import InstructGPTError

logger = logging.getLogger(__name__)

# Rows are taken out once they are this share of the batch, because each time the cache of the others is copied.
DROPPED_SHARE = 0.125
_MODES = (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH)
# Cache layers whose whole state is rows of keys and values. Subclasses add other states, such as recurrent ones.
_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
_INPUTS = {"attention_mask", "position_ids", "use_cache", "logits_to_keep"}  # beside the cache
# Logits processors that identify a row by its place in the batch.
_PROCESSORS = (
    logits_process.PrefixConstrainedLogitsProcessor,
    logits_process.SynthIDTextWatermarkLogitsProcessor,
    logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    logits_process.WatermarkLogitsProcessor,
)


class LogitsNotFinite(InstructGPTError):
    """Raised where a model's logits are NaN or infinite, so that no token can be drawn."""


class _PlainLoop(Exception):
    """Raised with the reason why ended rows have to stay in the batch."""


def generate(model: PreTrainedModel | PeftModel, **inputs: Any) -> Tensor:
    """Run `model.generate(**inputs)` without the decoding steps of rows that have ended.

    Greedy decoding gives transformers' tokens; sampling gives the same distribution. A row's random numbers depend on
    the seed, the row's place and the step only, not on which rows have ended. Beams, other kinds of caches and weights
    sharded over processes run in transformers' own loop, and the log says so once. Of the model's generation config,
    only the special tokens are used.

    Args:
        model: causal language model, whole or PEFT.
        inputs: of `generate`, with `input_ids` and `attention_mask` [B, P] padded left. The result is ids [B, P + T],
            padded right with the padding id up to the longest completion.

    Raises:
        LogitsNotFinite: if the logits to sample from hold NaN or infinity.
    """
    with call_settings_only(model):
        try:
            return model.generate(**inputs, custom_generate=_decode)
        except _PlainLoop as reason:
            _log_once(str(reason))
            return model.generate(**inputs)


@functools.cache
def _log_once(reason: str) -> None:
    logger.warning("Ended completions stay in the batch until the last one ends: %s.", reason)


def _decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **inputs: Any,
) -> Tensor:
    """The decoding loop, with the signature that `generate` expects of `custom_generate`."""
    key = _checked_cache(model, logits_processor, generation_config, inputs)
    batch, padding = len(input_ids), generation_config.pad_token_id
    rows = torch.arange(batch, device=input_ids.device)
    live = torch.ones_like(rows, dtype=torch.bool)
    ended: list[tuple[Tensor, Tensor]] = []
    first = True
    while True:
        step = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=None if first else 1, is_first_iteration=first, **inputs
        )
        outputs = model(**step, return_dict=True)
        inputs, first = next_inputs(model, outputs, inputs), False
        logits = outputs.logits[:, -1].to(input_ids.device, torch.float32, copy=True)
        del outputs  # the logits of the whole prompt, where the architecture gives them
        logits = logits_processor(input_ids, logits)
        tokens = _draw(logits, rows, batch) if generation_config.do_sample else logits.argmax(-1)
        input_ids = torch.cat([input_ids, tokens.where(live, padding)[:, None]], dim=1)
        live = live & ~stopping_criteria(input_ids, None)
        count = int(live.sum())
        if count == 0:
            break
        if len(rows) - count >= max(1, DROPPED_SHARE * len(rows)):
            ended.append((rows[~live], input_ids[~live]))
            kept = live.nonzero().squeeze(1)
            rows, input_ids, live = rows[kept], input_ids[kept], live[kept]
            inputs[key].batch_select_indices(kept)
            selected = ("attention_mask", "position_ids")
            inputs.update({name: inputs[name][kept] for name in selected if inputs.get(name) is not None})
    ended.append((rows, input_ids))
    result = input_ids.new_full((batch, input_ids.shape[1]), padding)
    for places, ids in ended:
        result[places, : ids.shape[1]] = ids
    return result


def _checked_cache(
    model: PreTrainedModel, processors: LogitsProcessorList, config: GenerationConfig, inputs: dict[str, Any]
) -> str:
    """Name of the cache in `inputs`; `_PlainLoop` if a row has state that `_decode` does not take out with it."""
    key = cache_name(inputs)
    mode, cache = config.get_generation_mode(), None if key is None else inputs[key]
    settings = [name for name in ("return_dict_in_generate", "prefill_chunk_size") if getattr(config, name, None)]
    layers = sorted({type(layer).__name__ for layer in getattr(cache, "layers", ()) if type(layer) not in _LAYERS})
    others = sorted(name for name, value in inputs.items() if value is not None and name not in {*_INPUTS, key})
    placed = [type(processor).__name__ for processor in processors if isinstance(processor, _PROCESSORS)]
    reasons: dict[str, Any] = {
        f"the generation mode is {mode.value}": mode not in _MODES,
        f"{' and '.join(settings)} is set": settings,
        "there is no padding token": config.pad_token_id is None,
        "the weights are sharded, so every process must take the same number of steps": has_sharded_weights(model),
        f"the cache is {'off' if cache is None else f'a {type(cache).__name__}'}": type(cache) is not DynamicCache,
        f"the cache has layers of another kind ({', '.join(layers)})": layers,
        "the cache is offloaded": getattr(cache, "offloading", False),
        f"the model is given {', '.join(others)}": others,
        f"{' and '.join(placed)} identifies a row by its place": placed,
    }
    for reason, applies in reasons.items():
        if applies:
            raise _PlainLoop(reason)
    assert key is not None, "a DynamicCache has a name"
    return key


def _draw(logits: Tensor, rows: Tensor, batch: int) -> Tensor:
    """Draw one token [b] per row from softmax(logits [b, V]), by the inverse of its cumulative distribution.

    One uniform number is drawn for each of the `batch` rows at the start, so that a row's numbers do not depend on
    which others are still there.
    """
    # In float32 the cumulative sum could not resolve tokens less likely than 6e-8. MPS has no float64.
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    points = torch.rand(batch, 1, dtype=wide, device=logits.device)[rows]
    mass = logits.softmax(-1).to(wide).cumsum(-1)
    if not mass[:, -1].isfinite().all():
        raise LogitsNotFinite("The model's logits are not finite (NaN or infinity), so no token can be drawn.")
    # The first token whose cumulative mass exceeds the point, so never one of probability 0.
    return torch.searchsorted(mass, points * mass[:, -1:], right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)
