"""Batches of rankings in which the completions of a prompt share one copy of the prompt.

A row holds one block or several; a block is one prompt and several of its completions, `[prompt | c1 | c2 | ...]`. A
completion attends to its prompt and to itself, and its positions restart after the prompt, so its hidden states are
those of a row of its own (`instructgpt_hf.models.prefix_sharing` turns `blocks` and `segments` into that mask).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

NO_BLOCK = -1  # the block of padding
# A layer spends about 24 h^2 operations per token on matrices and 4 L h on attention over a row of L tokens (hidden
# size h). Attention runs at about half the speed of a matrix product, so a token costs as much as 3 h + L.
_MATRIX_COST = 3


# A dataclass, because the Trainer rebuilds a tuple from one iterable, which a named tuple does not accept.
@dataclass(frozen=True)
class RankingPass:
    """Input of one forward pass: B rows of L tokens with M completions, those of a prompt next to each other.

    Rows that are shared have `blocks` and `segments`; where no row is shared, `attention_mask` takes their place.

    Attributes:
        input_ids: [B, L] token ids.
        position_ids: [B, L] positions; those of every completion start where its prompt ends.
        score_index: [M] index of each completion's last token in the flattened rows.
        ranks: [M] rank of each completion, 1 = best.
        lengths: [M] tokens of each completion, without its prompt.
        groups: [M] index of each completion's prompt in the batch, in increasing order.
        places: [M] index of each completion in its ranking, in increasing order within a prompt.
        attention_mask: [B, L] 1 for tokens, 0 for padding; or None.
        blocks: [B, L] number of each token's block in its row, -1 for padding; or None.
        segments: [B, L] 0 for the prompt, else the number of the completion in its block, from 1; or None.
    """

    input_ids: Tensor
    position_ids: Tensor
    score_index: Tensor
    ranks: Tensor
    lengths: Tensor
    groups: Tensor
    places: Tensor
    attention_mask: Tensor | None = None
    blocks: Tensor | None = None
    segments: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RankingPass:
        """Move every tensor to a device; accelerate's data loaders call it, too."""
        tensors = ((item.name, getattr(self, item.name)) for item in fields(self))
        return replace(self, **{name: x.to(device, non_blocking=non_blocking) for name, x in tensors if x is not None})


class Block(NamedTuple):
    """Completions that share one copy of their prompt in a row."""

    ranking: int  # index of the prompt in the batch
    completions: list[int]  # indices in the ranking
    length: int  # tokens of the prompt and these completions


@dataclass
class Forward:
    """Layout of one forward pass: its rows of blocks; `width` is the length of the longest row in tokens."""

    width: int
    rows: list[list[Block]] = field(default_factory=list)

    def room(self, row: list[Block]) -> int:
        """Free tokens of a row."""
        return self.width - _row_length(row)


def split_completions(
    prompt: int, completions: Sequence[int], hidden_size: int | None, max_tokens: int
) -> list[list[int]]:
    """Divide the completions of a ranking into the rows that cost least; returns their indices, row by row.

    Sharing saves copies of the prompt, but attention computes every pair of tokens of a row, so long completions of a
    short prompt are cheaper in rows of their own.

    Args:
        prompt: length of the prompt in tokens.
        completions: [K] length of each completion in tokens.
        hidden_size: hidden size of the model; None puts every completion into a row of its own.
        max_tokens: longest row of several completions, in tokens.
    """
    count = len(completions)
    if hidden_size is None:
        return [[index] for index in range(count)]

    def cost(rows: list[list[int]]) -> tuple[bool, int]:
        lengths = [prompt + sum(completions[index] for index in row) for row in rows]
        too_long = len(rows) < count and max(lengths) > max_tokens
        return too_long, sum(length * (_MATRIX_COST * hidden_size + length) for length in lengths)

    # Completions of similar length share a row, and rows hold as equal numbers of completions as possible.
    order = sorted(range(count), key=lambda index: completions[index])
    candidates = [
        [order[count * row // rows : count * (row + 1) // rows] for row in range(rows)] for rows in range(1, count + 1)
    ]
    return min(candidates, key=cost)


def plan_forwards(rankings: Sequence[Sequence[Block]], max_tokens: int, pack: bool) -> list[Forward]:
    """Lay out blocks in forward passes, all blocks of a ranking in the same pass.

    First-fit decreasing: rankings go from the longest to the shortest into the first pass with room. A pass is as wide
    as its longest block, so further blocks in its shorter rows cost nothing.

    Args:
        max_tokens: rows x width of one pass; only a ranking that is larger on its own exceeds it.
        pack: whether a row may hold several blocks.
    """
    passes: list[Forward] = []
    ordered = [sorted(blocks, key=lambda block: block.length, reverse=True) for blocks in rankings]
    for blocks in sorted(ordered, key=lambda blocks: blocks[0].length, reverse=True):
        if not any(_place(forward, blocks, max_tokens, pack) for forward in passes):
            passes.append(opened := Forward(width=blocks[0].length))
            _place(opened, blocks, max(max_tokens, opened.width * len(blocks)), pack)
    return passes


def split_forward(forward: Forward, max_tokens: int) -> list[Forward]:
    """Split a larger pass into parts of at most `max_tokens` each; a part of one row may be longer."""
    if len(forward.rows) * forward.width <= max_tokens:
        return [forward]
    parts: list[Forward] = []
    for row in sorted(forward.rows, key=_row_length, reverse=True):
        if not parts or (len(parts[-1].rows) + 1) * parts[-1].width > max_tokens:
            parts.append(Forward(width=_row_length(row)))
        parts[-1].rows.append(row)
    return parts


def _row_length(row: list[Block]) -> int:
    return sum(block.length for block in row)


def _place(forward: Forward, blocks: list[Block], max_tokens: int, pack: bool) -> bool:
    """Add all blocks to a pass if they fit; returns whether they did."""
    rows = [list(row) for row in forward.rows]
    for block in blocks:
        row = next((row for row in rows if pack and forward.room(row) >= block.length), None)
        if row is None:
            rows.append(row := [])
        row.append(block)
    if len(rows) > len(forward.rows) and len(rows) * forward.width > max_tokens:
        return False  # a pass that exceeds the limit by itself still takes what its rows have room for
    forward.rows = rows
    return True


@dataclass
class RankingCollator:
    """Data collator of the reward model: turns tokenized rankings into the forward passes that score them.

    Attributes:
        pad_token_id: padding id.
        max_tokens: tokens of one forward pass, padding included; a single row may exceed it.
        hidden_size: hidden size of a model that takes shared rows; None gives every completion a row of its own, with
            an ordinary attention mask.
        padding_side: `"right"` or `"left"`; the scores do not depend on it.
        whole_rankings: keep a ranking in one pass, also where it exceeds `max_tokens`.
    """

    pad_token_id: int
    max_tokens: int
    hidden_size: int | None = None
    padding_side: str = "right"
    whole_rankings: bool = False

    def __call__(self, rankings: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate G rankings with `prompt_ids`, `completion_ids` [K] and `ranks` [K].

        Returns:
            `labels` [G], one zero for each prompt, which is how the Trainer counts a batch; and `forwards`, a list of
            passes. A pass is a list of `RankingPass`: one, or several where one ranking exceeds `max_tokens`.
        """
        blocks = [self._blocks(index, ranking) for index, ranking in enumerate(rankings)]
        plan = plan_forwards(blocks, self.max_tokens, pack=self.hidden_size is not None)
        parts = [[forward] if self.whole_rankings else split_forward(forward, self.max_tokens) for forward in plan]
        return {
            "labels": torch.zeros(len(rankings), dtype=torch.long),
            "forwards": [[self._tensors(part, rankings) for part in forward] for forward in parts],
        }

    def _blocks(self, index: int, ranking: dict[str, Any]) -> list[Block]:
        prompt, lengths = len(ranking["prompt_ids"]), [len(ids) for ids in ranking["completion_ids"]]
        return [
            Block(index, completions, prompt + sum(lengths[number] for number in completions))
            for completions in split_completions(prompt, lengths, self.hidden_size, self.max_tokens)
        ]

    def _tensors(self, forward: Forward, rankings: list[dict[str, Any]]) -> RankingPass:
        shape = (len(forward.rows), forward.width)
        input_ids = torch.full(shape, self.pad_token_id)
        positions, segments = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        blocks = torch.full(shape, NO_BLOCK)
        ends: dict[tuple[int, int], int] = {}  # (ranking, completion) -> index of its last token
        for row, contents in enumerate(forward.rows):
            start = forward.room(contents) if self.padding_side == "left" else 0
            for number, block in enumerate(contents):
                blocks[row, start : start + block.length] = number
                ranking = rankings[block.ranking]
                completions = [ranking["completion_ids"][index] for index in block.completions]
                for segment, ids in enumerate([ranking["prompt_ids"], *completions]):
                    place = slice(start, start + len(ids))
                    first = len(ranking["prompt_ids"]) if segment else 0
                    input_ids[row, place] = torch.tensor(ids)
                    positions[row, place] = torch.arange(first, first + len(ids))
                    segments[row, place] = segment
                    start += len(ids)
                    if segment:
                        ends[block.ranking, block.completions[segment - 1]] = row * forward.width + start - 1
        members = sorted(ends)
        shared = any(len(contents) > 1 or len(contents[0].completions) > 1 for contents in forward.rows)
        return RankingPass(
            input_ids=input_ids,
            position_ids=positions,
            score_index=torch.tensor([ends[member] for member in members]),
            ranks=torch.tensor([rankings[index]["ranks"][number] for index, number in members]),
            lengths=torch.tensor([len(rankings[index]["completion_ids"][number]) for index, number in members]),
            groups=torch.tensor([index for index, _ in members]),
            places=torch.tensor([number for _, number in members]),
            attention_mask=None if shared else (blocks != NO_BLOCK).long(),
            blocks=blocks if shared else None,
            segments=segments if shared else None,
        )
