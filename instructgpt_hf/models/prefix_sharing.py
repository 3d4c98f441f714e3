"""Scores of completions that share their prompt in a row.

Within a row, a token attends to the prompt of its block and to the earlier tokens of its own completion. Each
completion's positions start after the prompt, so hidden states and gradients equal those of one row per completion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from instructgpt_hf._compat.peft import unwrap_peft
from instructgpt_hf._compat.quirks import attention_implementation
from instructgpt_hf.data.rankings.batches import RankingCollator, RankingPass
from instructgpt_hf.errors import first_line
from instructgpt_hf.models.inputs import evaluation_mode, takes_positions
from instructgpt_hf.models.reward_model import HEAD, head_scores

Mask = torch.Tensor | BlockMask

_LAYER_TYPES = {"full_attention", "sliding_attention"}
FLEX = "flex_attention"
_IMPLEMENTATIONS = ("sdpa", "eager", FLEX)
# Largest difference between shared and separate rows, relative to how much two completions differ.
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 0.1
# The probe's prompt length and completion lengths for two prompts, the second of which fits into the first one's row.
_PROBE_PROMPT, _PROBE_COMPLETIONS, _PROBE_TOKENS = 6, ((9, 3, 5), (2, 4)), 1_000


class CompletionScorer:
    """Makes a sequence classifier return the scores of chosen tokens instead of one per row.

    Hooks read the head's input at the chosen tokens and put their scores in the place of the pooled logits, so that
    the forward pass still runs through the model and its DDP or FSDP wrapper. They do nothing in other calls.

    Args:
        model: sequence classifier with a scalar head, whole or PEFT, before any distributed wrapper is around it.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.classifier = unwrap_peft(model)
        self._index: torch.Tensor | None = None
        self._scores: torch.Tensor | None = None
        getattr(self.classifier, HEAD).register_forward_pre_hook(self._read)
        self.classifier.register_forward_hook(self._replace)

    def _read(self, head: nn.Linear, arguments: tuple[torch.Tensor, ...]) -> None:
        if self._index is not None:
            index, self._index = self._index, None  # first, because the head is called again
            self._scores = head_scores(head, arguments[0].flatten(0, 1)[index])

    def _replace(self, model: PreTrainedModel, arguments: Any, output: ModelOutput) -> None:
        if self._scores is not None:
            output.logits, self._scores = self._scores, None

    def __call__(self, model: torch.nn.Module, batch: RankingPass, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Raw scores [M] in float32, without `config.reward_shift`.

        Args:
            model: the classifier or its distributed wrapper.
            batch: a pass, or a part of one, from `RankingCollator`.
            dtype: dtype of attention under autocast; None for the model's.
        """
        mask: Any = batch.attention_mask
        if mask is None:
            mask = attention_masks(self.classifier, batch, dtype or self.classifier.dtype)
        inputs = {"input_ids": batch.input_ids, "attention_mask": mask, "use_cache": False}
        if takes_positions(self.classifier):
            inputs["position_ids"] = batch.position_ids
        self._index = batch.score_index
        try:
            return model(**inputs).logits
        finally:
            self._index = self._scores = None


def attention_masks(model: PreTrainedModel, batch: RankingPass, dtype: torch.dtype) -> Mask | dict[str, Mask]:
    """Masks of shared rows with `position_ids`, `blocks` and `segments` [B, L], for a model without wrappers.

    The result is an additive mask [B, 1, L, L] in `dtype`, or for flex attention a `BlockMask` of that shape; where
    the config names types of layers, a dict with one for each.
    """
    config = model.config.get_text_config()

    def make(window: int | None) -> Mask:
        visible = _visibility(batch, window)
        rows, length = batch.position_ids.shape
        if attention_implementation(config) == FLEX:
            return create_block_mask(visible, rows, None, length, length, batch.position_ids.device)
        row, place = (torch.arange(size, device=batch.position_ids.device) for size in (rows, length))
        seen = visible(row[:, None, None], None, place[:, None], place[None, :])
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]

    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in types:
        return {name: make(window if name == "sliding_attention" else None) for name in types}
    # Without layer types, the window applies to all layers.
    return make(None if types else window)


def _visibility(batch: RankingPass, window: int | None) -> Callable[..., torch.Tensor]:
    """The mask as a function of the broadcastable indices of row, head, query and key."""
    positions, blocks, segments = batch.position_ids, batch.blocks, batch.segments
    assert blocks is not None and segments is not None, "rows that are not shared need no such mask"

    def visible(row: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        of_prompt_or_own = (segments[row, key] == 0) | (segments[row, query] == segments[row, key])
        seen = (query >= key) & (blocks[row, query] == blocks[row, key]) & of_prompt_or_own
        if window is not None:
            seen = seen & (positions[row, query] - positions[row, key] < window)
        return seen

    return visible


def shared_prefix_refusal(scorer: CompletionScorer, pad_token_id: int, dtype: torch.dtype | None = None) -> str | None:
    """Why a model cannot score completions that share a row, or None if it can.

    Where the config leaves it open, random tokens are scored in a shared row and in separate rows.

    Args:
        scorer: of the model, before any distributed wrapper is around it.
        pad_token_id: a token that the probe avoids.
        dtype: dtype of attention under autocast; None for the model's.
    """
    model = scorer.classifier
    config = model.config.get_text_config()
    implementation = attention_implementation(config)
    if implementation not in _IMPLEMENTATIONS:
        return f"attn_implementation {implementation!r} is not {' or '.join(_IMPLEMENTATIONS)}"
    if implementation == FLEX and model.device.type == "cpu":
        return f"{FLEX} has no backward pass on a CPU"
    if not takes_positions(model):
        return f"{type(model).__name__} cannot be told the positions of its tokens"
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if unknown:
        return f"its layers of type {', '.join(unknown)} are not plain attention"
    try:
        with evaluation_mode(model):
            return _probe(scorer, pad_token_id, dtype or model.dtype)
    except Exception as error:  # architectures refuse such a mask with many kinds of errors
        return f"{type(model).__name__} refuses a mask with a row for every token ({first_line(error)})"


@torch.no_grad()
def _probe(scorer: CompletionScorer, pad_token_id: int, dtype: torch.dtype) -> str | None:
    model = scorer.classifier
    device, vocabulary = next(model.parameters()).device, model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        drawn: list[int] = torch.randint(vocabulary - 1, (count,), generator=generator).tolist()
        return [token + (token >= pad_token_id) for token in drawn]

    rankings = []
    for lengths in _PROBE_COMPLETIONS:
        prompt_ids, completion_ids = tokens(_PROBE_PROMPT), [tokens(count) for count in lengths]
        rankings.append({"prompt_ids": prompt_ids, "completion_ids": completion_ids, "ranks": [1] * len(lengths)})

    def scores(hidden_size: int | None) -> torch.Tensor:
        ((batch,),) = RankingCollator(pad_token_id, _PROBE_TOKENS, hidden_size)(rankings)["forwards"]
        return scorer(model, batch.to(device), dtype)

    apart, shared = scores(None), scores(_PROBE_TOKENS)
    error = (shared - apart).abs().max() / (apart.max() - apart.min())
    half = dtype in (torch.float16, torch.bfloat16)
    if error <= (_HALF_TOLERANCE if half else _TOLERANCE):  # also false for NaN
        return None
    return f"{type(model).__name__} scores completions differently in a shared row (by {error:.1g} of their spread)"
