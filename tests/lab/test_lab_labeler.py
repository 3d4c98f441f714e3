"""The gold labeler against examples scored by hand, and its noise against the paper's labelers."""

from __future__ import annotations

import random

import pytest

from instructgpt_hf import lab
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.lab.files import rows
from instructgpt_hf.lab.instructions import draw, parse, render
from instructgpt_hf.lab.labeler import TIE_MARGIN, criteria

# The fox is a small red animal in the meadow; the cow is large and brown.
EXAMPLES = [
    ("What colour is the fox?", "Of course! The fox is red.", 6.0),
    ("What colour is the fox?", "The fox is red.", 5.0),
    ("What colour is the fox?", "the fox is red", 4.0),  # no capital, no full stop
    ("What colour is the fox?", "The fox is blue.", -0.5),  # false: 1 clear - 1.5
    ("What colour is the fox?", "The fox is small.", 1.0),  # true, not what was asked
    ("What colour is the fox?", "The fox is red. The cow is large.", 4.5),
    ("What colour is the fox?", "The fox is red. The fox is red.", 4.0),
    ("What colour is the fox?", "I hope this helps.", -1.0),  # courtesy alone is worth nothing
    ("What colour is the fox?", "", -3.0),
    ("What colour is the fox?", "red", -2.0),
    ("Describe the fox.", "The fox is a red animal. It is in the meadow. Have a nice day!", 6.0),
    ("Describe the colour and the size of the fox.", "The fox is red. It is large.", 4 * 0.5 - 1.5 + 1),
    ("Is the fox red?", "Yes, the fox is red.", 5.0),
    ("Is the fox blue?", "No, the fox is red.", 5.0),
    ("Is the fox blue?", "Yes, the fox is blue.", -2.0),  # two false statements
    ("List two birds.", "The owl and the hen are birds.", 5.0),
    ("List two birds.", "The owl and the owl are birds.", 3.0),  # one bird only
    ("List two birds.", "The owl and the fox are birds.", 2.0 - 1.5 + 1),
    ("List two birds.", "The owl, the hen, the crow and the duck are birds.", 1.0),  # twice as many as asked
    ("Write a sentence with fox and cow.", "Ann sees the fox and the cow.", 5.0),
    ("Write a sentence with fox and cow.", "Ann sees the fox.", 3.0),
    ("Write a sentence with fox and cow.", "fox cow", -2.0),
    ("Which is larger, the fox or the cow?", "The cow is larger than the fox.", 5.0),
    ("Which is larger, the fox or the cow?", "The fox is smaller than the cow.", 5.0),
    ("Which is larger, the fox or the cow?", "The fox is larger than the cow.", -0.5),
    ("Say hello to the fox.", "Hello, dear fox!", 5.0),
    ("Say hello to the fox.", "Goodbye, fox!", 3.0),
]


@pytest.mark.parametrize(("prompt", "completion", "expected"), EXAMPLES)
def test_scores_match_the_criteria_added_up_by_hand(prompt: str, completion: str, expected: float) -> None:
    assert lab.gold_scores([prompt], [completion]) == [pytest.approx(expected)]
    assert sum(criteria(prompt, completion).values()) == pytest.approx(expected)


@pytest.mark.parametrize("prompt", sorted({prompt for prompt, _, _ in EXAMPLES}))
def test_degenerate_answers_score_below_zero_for_every_kind_of_prompt(prompt: str) -> None:
    words = [word.strip(".,?") for word in prompt.split()]
    degenerate = [
        "",
        " ",
        ".",
        "The the the the the the the the.",
        " ".join(words * 4),
        "The fox fox fox cow cow cow birds birds red red.",
        "Of course! " * 8,
        "I hope this helps. Have a nice day!",
        "The hammer is a tool. " * 6,
        " ".join(f"The {thing} is red." for thing in ("fox", "cow", "owl", "hen", "pig", "saw", "hat", "cup") * 2),
        prompt,
    ]
    scores = lab.gold_scores([prompt] * len(degenerate), degenerate)
    assert max(scores) < 0, dict(zip(degenerate, scores, strict=True))


def test_a_careful_answer_beats_a_careless_one_and_both_beat_noise() -> None:
    from instructgpt_hf.lab.answers import answer, spoil

    rng = random.Random(0)
    means = []
    instructions = [draw(rng) for _ in range(400)]
    prompts = [render(instruction) for instruction in instructions]
    for write in (
        lambda instruction: answer(instruction, 1.0, rng),
        lambda instruction: answer(instruction, 0.5, rng),
        lambda instruction: spoil(answer(instruction, 0.5, rng), rng),
    ):
        means.append(sum(lab.gold_scores(prompts, [write(x) for x in instructions])) / len(prompts))
    assert means[0] > means[1] + 1 > means[2] + 2
    assert means[0] > 5


def test_every_instruction_is_read_back_from_both_its_wordings() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        instruction = draw(rng)
        assert parse(render(instruction, 0)) == parse(render(instruction, 1)) == instruction


def test_a_foreign_prompt_and_unequal_lengths_are_errors() -> None:
    with pytest.raises(InstructGPTError, match="before any prompt template"):
        lab.gold_scores(["User: What colour is the fox?\nAssistant:"], ["The fox is red."])
    with pytest.raises(InstructGPTError, match="2 prompts, but 1 completions"):
        lab.gold_scores(["What colour is the fox?"] * 2, ["The fox is red."])


def test_ranks_without_noise_follow_the_scores_and_tie_when_near() -> None:
    prompt = "What colour is the fox?"
    completions = ["The fox is blue.", "The fox is red.", "Of course! The fox is red.", "Gladly! The fox is red.", ""]
    assert lab.gold_ranks(prompt, completions, 0.0, random.Random(0)) == [3, 2, 1, 1, 4]
    assert TIE_MARGIN > 0


def test_two_noisy_labelers_agree_as_often_as_the_papers() -> None:
    rng = random.Random(2)
    agree = pairs = 0
    for row in rows("rankings.train", 5, 1000):
        first, second = (lab.gold_ranks(row["prompt"], row["completions"], lab.LABELER_NOISE, rng) for _ in range(2))
        for i in range(len(first)):
            for j in range(i):
                if first[i] != first[j] and second[i] != second[j]:
                    pairs += 1
                    agree += (first[i] < first[j]) == (second[i] < second[j])
    # Paper, section 3.4: 72.6 % for training labelers, 77.3 % for held-out ones.
    assert agree / pairs == pytest.approx(0.73, abs=0.02)
