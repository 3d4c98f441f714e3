"""Batches of ranked completions that encode every prompt once.

A row holds one prompt and several of its completions, `[prompt | c1 | c2 | ...]`, or several such blocks. A completion
attends to its own prompt and to itself, and its positions restart after the prompt, so each of its tokens sees what it
would see in a row of its own (`instructgpt_hf.models.prefix_sharing` turns `blocks` and `segments` into that mask).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Batch = dict[str, torch.Tensor]
# Of a token of padding, which belongs to no block.
NO_BLOCK = -1
# A layer spends about 24 h^2 operations per token on matrices and 4 L h on attention over a row of L tokens (hidden
# size h). Attention runs at about half the speed of a matrix product, so a token costs as much as 3 h + L.
_MATRIX_COST = 3


@dataclass
class Block:
    """Completions that share one copy of their prompt in a row.

    Attributes:
        ranking: index of the prompt in the batch.
        completions: indices of its completions.
        length: tokens of the prompt and these completions.
    """

    ranking: int
    completions: list[int]
    length: int


@dataclass
class Forward:
    """The rows of one forward pass; `width` is the length of the longest."""

    width: int
    rows: list[list[Block]] = field(default_factory=list)

    def room(self, row: int) -> int:
        """Tokens that row still takes without becoming longer than the longest."""
        return self.width - _row_length(self.rows[row])


def split_completions(
    prompt: int, completions: Sequence[int], hidden_size: int | None, max_tokens: int
) -> list[list[int]]:
    """Which completions of a ranking share a row, so that the rows cost least.

    Sharing saves the prompt's tokens, but attention computes every pair of tokens of a row, so long completions of a
    short prompt are cheaper apart.

    Args:
        prompt: tokens of the prompt.
        completions: [K] tokens of each completion.
        hidden_size: of the model; None puts every completion into a row of its own.
        max_tokens: longest row that completions share.

    Returns:
        Indices of the completions, row by row.
    """
    count = len(completions)
    if hidden_size is None:
        return [[index] for index in range(count)]

    def cost(rows: list[list[int]]) -> tuple[bool, int]:
        lengths = [prompt + sum(completions[index] for index in row) for row in rows]
        too_long = len(rows) < count and max(lengths) > max_tokens
        return too_long, sum(length * (_MATRIX_COST * hidden_size + length) for length in lengths)

    # Neighbours in length share a row, in as even numbers as possible.
    order = sorted(range(count), key=lambda index: completions[index])
    candidates = [
        [order[count * row // rows : count * (row + 1) // rows] for row in range(rows)] for rows in range(1, count + 1)
    ]
    return min(candidates, key=cost)


def plan_forwards(rankings: Sequence[Sequence[Block]], max_tokens: int, pack: bool) -> list[Forward]:
    """Forward passes that together hold every block, all blocks of a ranking in the same pass.

    Rankings go from the longest to the shortest into the first pass with room. A pass is as wide as its longest block;
    what shorter rows leave free is filled with other blocks, which costs nothing.

    Args:
        rankings: the blocks of each ranking.
        max_tokens: rows x width of one pass; only a ranking that is larger on its own exceeds it.
        pack: whether a row may hold several blocks.
    """
    passes: list[Forward] = []
    for blocks in sorted(rankings, key=lambda item: max(block.length for block in item), reverse=True):
        ordered = sorted(blocks, key=lambda block: block.length, reverse=True)
        for item in passes:
            if _place(item, ordered, max_tokens, pack):
                break
        else:
            opened = Forward(width=ordered[0].length)
            _place(opened, ordered, max(max_tokens, opened.width * len(ordered)), pack)
            passes.append(opened)
    return passes


def split_forward(item: Forward, max_tokens: int) -> list[Forward]:
    """The rows of a pass in parts of at most `max_tokens` each; a part of one row may be longer."""
    parts: list[Forward] = []
    for row in sorted(item.rows, key=_row_length, reverse=True):
        if not parts or (len(parts[-1].rows) + 1) * parts[-1].width > max_tokens:
            parts.append(Forward(width=_row_length(row)))
        parts[-1].rows.append(row)
    return parts


def _row_length(row: list[Block]) -> int:
    return sum(block.length for block in row)


def _place(item: Forward, blocks: list[Block], max_tokens: int, pack: bool) -> bool:
    """Add blocks to a pass if all of them fit; none of them otherwise."""
    free = [item.room(row) for row in range(len(item.rows))] if pack else []
    target: list[int] = []
    new_rows = 0
    for block in blocks:
        row = next((index for index, room in enumerate(free) if room >= block.length), None)
        if row is None:
            new_rows += 1
            if (len(item.rows) + new_rows) * item.width > max_tokens:
                return False
            row = len(item.rows) + new_rows - 1
            if pack:
                free.append(item.width)
        if pack:
            free[row] -= block.length
        target.append(row)
    item.rows.extend([] for _ in range(new_rows))
    for block, row in zip(blocks, target, strict=True):
        item.rows[row].append(block)
    return True


class RankingCollator:
    """Turns tokenized rankings into the forward passes that score all of their completions.

    Args:
        pad_token_id: padding id.
        max_tokens: tokens of one forward pass, padding included; a single sequence may exceed it.
        hidden_size: of a model that takes shared rows; None gives every completion a row of its own, with an ordinary
            attention mask.
        padding_side: `"right"` or `"left"`; the scores do not depend on it.
        whole_rankings: keep a ranking in one pass, also where it exceeds `max_tokens`.
    """

    def __init__(
        self,
        pad_token_id: int,
        max_tokens: int,
        hidden_size: int | None = None,
        padding_side: str = "right",
        whole_rankings: bool = False,
    ) -> None:
        self.pad_token_id = pad_token_id
        self.max_tokens = max_tokens
        self.hidden_size = hidden_size
        self.padding_side = padding_side
        self.whole_rankings = whole_rankings

    def __call__(self, rankings: list[dict[str, Any]]) -> dict[str, Any]:
        """G rankings with `prompt_ids`, `completion_ids` [K] and `ranks` [K].

        Returns:
            `labels` [G], one zero for each prompt, which is how the Trainer counts a batch; and `forwards`, the
            passes, each a list of parts: one, or more where a single ranking exceeds the tokens of a pass. A part has
            B rows of L tokens that hold M completions: `input_ids`, `position_ids` [B, L]; `blocks` and `segments`
            [B, L] (the block of a token, -1 for padding; 0 for the prompt, else the completion's number in its block)
            or, where no row is shared, `attention_mask` [B, L]; `score_index` [M], the places of the completions' last
            tokens in the flattened rows; `ranks`, `lengths` [M]; `groups` [M], the prompt's index in `rankings`, and
            `places` [M], the completion's index in its ranking, in increasing order.
        """
        blocks = [self._blocks(index, ranking) for index, ranking in enumerate(rankings)]
        plan = plan_forwards(blocks, self.max_tokens, pack=self.hidden_size is not None)
        return {
            "labels": torch.zeros(len(rankings), dtype=torch.long),
            "forwards": [[self._batch(part, rankings) for part in self._parts(item)] for item in plan],
        }

    def _parts(self, item: Forward) -> list[Forward]:
        whole = self.whole_rankings or len(item.rows) * item.width <= self.max_tokens
        return [item] if whole else split_forward(item, self.max_tokens)

    def _blocks(self, index: int, ranking: dict[str, Any]) -> list[Block]:
        prompt, lengths = len(ranking["prompt_ids"]), [len(ids) for ids in ranking["completion_ids"]]
        return [
            Block(index, completions, prompt + sum(lengths[item] for item in completions))
            for completions in split_completions(prompt, lengths, self.hidden_size, self.max_tokens)
        ]

    def _batch(self, item: Forward, rankings: list[dict[str, Any]]) -> Batch:
        shape = (len(item.rows), item.width)
        input_ids = torch.full(shape, self.pad_token_id)
        positions, segments = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        blocks = torch.full(shape, NO_BLOCK)
        ends: dict[tuple[int, int], int] = {}
        for row, contents in enumerate(item.rows):
            filled = sum(block.length for block in contents)
            start = item.width - filled if self.padding_side == "left" else 0
            for number, block in enumerate(contents):
                blocks[row, start : start + block.length] = number
                pieces = _pieces(rankings[block.ranking], block)
                for segment, (completion, ids, position) in enumerate(pieces):
                    place = slice(start, start + len(ids))
                    input_ids[row, place] = torch.tensor(ids)
                    positions[row, place] = torch.arange(position, position + len(ids))
                    segments[row, place] = segment
                    start += len(ids)
                    ends[block.ranking, completion] = row * item.width + start - 1
        members = sorted(key for key in ends if key[1] >= 0)
        batch = {
            "input_ids": input_ids,
            "position_ids": positions,
            "score_index": torch.tensor([ends[member] for member in members]),
            "ranks": torch.tensor([rankings[index]["ranks"][number] for index, number in members]),
            "lengths": torch.tensor([len(rankings[index]["completion_ids"][number]) for index, number in members]),
            "groups": torch.tensor([index for index, _ in members]),
            "places": torch.tensor([number for _, number in members]),
        }
        if all(len(contents) == 1 and len(contents[0].completions) == 1 for contents in item.rows):
            return {**batch, "attention_mask": (blocks != NO_BLOCK).long()}
        return {**batch, "blocks": blocks, "segments": segments}


def _pieces(ranking: dict[str, Any], block: Block) -> list[tuple[int, list[int], int]]:
    """The prompt (as completion -1) and the block's completions, each with its ids and first position."""
    prompt = ranking["prompt_ids"]
    completions = [(index, ranking["completion_ids"][index], len(prompt)) for index in block.completions]
    return [(-1, prompt, 0), *completions]
