"""Rows that share prompts: every token where it belongs, every completion scored once, within the budget of tokens."""

import dataclasses
import itertools
import random

import pytest
import torch
from accelerate.utils import send_to_device

from instructgpt_hf.data.rankings.batches import Block, RankingCollator, plan_forwards, split_completions

PAD = 0
# K from 2 to 9, prompts and completions of all lengths, ids that tell prompts and completions apart.
MIXED = [
    {
        "prompt_ids": [100 * number + 1] * (3 * number + 1),
        "completion_ids": [[100 * number + 2 + place] * (1 + (5 * place + number) % 7) for place in range(count)],
        "ranks": [1 + place % 3 for place in range(count)],
    }
    for number, count in enumerate([4, 9, 2, 6, 3, 9], start=1)
]


def sequences(rankings):
    return [
        (row["prompt_ids"] + ids, row["ranks"][place])
        for row in rankings
        for place, ids in enumerate(row["completion_ids"])
    ]


def parts(batch):
    return [part for item in batch["forwards"] for part in item]


def read_back(batch):
    """What each completion sees, read off a batch token by token: ids and positions, and its rank and group."""
    found = []
    width = batch.input_ids.shape[1]
    for index, rank, group in zip(
        batch.score_index.tolist(), batch.ranks.tolist(), batch.groups.tolist(), strict=True
    ):
        row, column = divmod(index, width)
        ids, positions = batch.input_ids[row].tolist(), batch.position_ids[row].tolist()
        if batch.attention_mask is not None:
            seen = [place for place in range(column + 1) if batch.attention_mask[row, place]]
        else:
            blocks, segments = batch.blocks[row].tolist(), batch.segments[row].tolist()
            seen = [
                place
                for place in range(column + 1)
                if blocks[place] == blocks[column] and segments[place] in (0, segments[column])
            ]
        assert [positions[place] for place in seen] == list(range(len(seen)))
        found.append(([ids[place] for place in seen], rank, group))
    return found


@pytest.mark.parametrize("hidden_size", [None, 1, 16, 10_000])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_tokens", [1, 60, 200, 10_000])
def test_every_completion_sees_its_own_sequence(hidden_size, side, max_tokens):
    batch = RankingCollator(PAD, max_tokens, hidden_size, side)(MIXED)
    assert batch["labels"].tolist() == [0] * len(MIXED)
    found = [item for one in parts(batch) for item in read_back(one)]
    assert sorted((ids, rank) for ids, rank, _ in found) == sorted(sequences(MIXED))
    for ids, _, group in found:
        assert ids[0] == MIXED[group]["prompt_ids"][0]


@pytest.mark.parametrize("hidden_size", [None, 16, 10_000])
def test_a_ranking_stays_together_and_in_order(hidden_size):
    for (batch,) in RankingCollator(PAD, 80, hidden_size, whole_rankings=True)(MIXED)["forwards"]:
        for group in set(batch.groups.tolist()):
            own = batch.groups == group
            assert batch.places[own].tolist() == list(range(len(MIXED[group]["ranks"])))
            assert batch.ranks[own].tolist() == MIXED[group]["ranks"]
            assert batch.lengths[own].tolist() == [len(ids) for ids in MIXED[group]["completion_ids"]]


def _members(part):
    return zip(part.groups.tolist(), part.places.tolist(), strict=True)


@pytest.mark.parametrize("hidden_size", [None, 16, 10_000])
@pytest.mark.parametrize("max_tokens", [20, 50, 100, 400])
def test_budget_of_tokens(hidden_size, max_tokens):
    """Only a sequence that is longer on its own exceeds it; a ranking that does is computed in parts."""
    forwards = RankingCollator(PAD, max_tokens, hidden_size)(MIXED)["forwards"]
    for item in forwards:
        for batch in item:
            assert batch.input_ids.numel() <= max_tokens or len(batch.ranks) == 1
        members = sorted((group, place) for part in item for group, place in _members(part))
        expected = [
            (group, place) for group in {group for group, _ in members} for place in range(len(MIXED[group]["ranks"]))
        ]
        assert members == sorted(expected)
    assert any(len(item) > 1 for item in forwards) == (max_tokens < 100) or hidden_size != 16


def test_padding_is_no_ones():
    ((batch,),) = RankingCollator(PAD, 10_000, 10_000)(MIXED)["forwards"]
    padding = batch.blocks == -1
    assert padding.any() and (batch.input_ids[padding] == PAD).all() and (batch.input_ids[~padding] != PAD).all()


def test_short_prompts_fill_the_rows_of_long_ones():
    """One row of 50, and two of 20 and one of 10 that fit into another of that width."""
    rankings = [[Block(0, [0, 1], 50)], [Block(1, [0, 1], 20)], [Block(2, [0, 1], 10)], [Block(3, [0, 1], 20)]]
    (item,) = plan_forwards(rankings, 100, pack=True)
    assert item.width == 50
    assert [[block.ranking for block in row] for row in item.rows] == [[0], [1, 3, 2]]
    unpacked = plan_forwards(rankings, 100, pack=False)
    assert [[[block.ranking for block in row] for row in item.rows] for item in unpacked] == [[[0], [1]], [[3], [2]]]


def test_a_pass_over_the_limit_takes_what_fits_into_its_rows():
    rankings = [[Block(0, [0], 50), Block(0, [1], 30)], [Block(1, [0, 1], 20)], [Block(2, [0, 1], 10)]]
    plan = plan_forwards(rankings, 60, pack=True)
    assert [[[block.ranking for block in row] for row in item.rows] for item in plan] == [[[0], [0, 1]], [[2]]]


def test_no_row_overflows():
    draw = random.Random(0)
    for _ in range(200):
        rankings = [
            [Block(index, [0], draw.randint(1, 60)) for _ in range(draw.randint(1, 4))]
            for index in range(draw.randint(1, 12))
        ]
        for pack in (True, False):
            plan = plan_forwards(rankings, draw.randint(1, 300), pack)
            placed = [block for item in plan for row in item.rows for block in row]
            assert sorted(map(id, placed)) == sorted(map(id, itertools.chain(*rankings)))
            for item in plan:
                lengths = [sum(block.length for block in row) for row in item.rows]
                assert min(lengths) > 0 and max(lengths) == item.width


class TestSplit:
    def test_a_long_prompt_is_shared_by_all(self):
        assert split_completions(200, [10] * 5, 128, 10_000) == [[0, 1, 2, 3, 4]]

    def test_long_completions_of_a_short_prompt_stay_apart(self):
        assert split_completions(5, [500] * 4, 128, 10_000) == [[0], [1], [2], [3]]

    def test_in_between(self):
        """Two rows of three cost 2 x 260 x (3 x 64 + 260) = 235,040; six cost 249,600 and one 309,120."""
        assert [len(row) for row in split_completions(80, [60] * 6, 64, 10_000)] == [3, 3]

    def test_neighbours_in_length_share(self):
        assert split_completions(80, [70, 50, 70, 50, 70, 50], 80, 10_000) == [[1, 3, 5], [0, 2, 4]]

    def test_no_row_of_several_is_longer_than_a_pass(self):
        assert [len(row) for row in split_completions(200, [10] * 6, 128, 230)] == [3, 3]
        assert [len(row) for row in split_completions(200, [10] * 3, 128, 100)] == [1, 1, 1]

    def test_architectures_without_sharing(self):
        assert split_completions(200, [10] * 3, None, 10_000) == [[0], [1], [2]]


def test_plain_rows_have_a_plain_mask():
    """Where no row is shared, attention can use its fast causal kernel."""
    for (batch,) in RankingCollator(PAD, 10_000, None)(MIXED)["forwards"]:
        assert batch.blocks is None and batch.segments is None
        assert torch.equal(batch.attention_mask, (batch.input_ids != PAD).long())


@pytest.mark.parametrize("hidden_size", [None, 10_000])
def test_a_pass_moves_as_a_whole(hidden_size):
    """As accelerate's data loaders move a batch."""
    batch = RankingCollator(PAD, 10_000, hidden_size)(MIXED)
    ((one,),), ((moved,),) = batch["forwards"], send_to_device(batch, "meta", non_blocking=True)["forwards"]
    for item in dataclasses.fields(one):
        before, after = getattr(one, item.name), getattr(moved, item.name)
        assert (before is None) == (after is None)
        assert after is None or (after.device.type, after.shape) == ("meta", before.shape)
