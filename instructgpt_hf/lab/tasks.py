"""Few-shot tasks of the pretraining text: the micro-world's counterpart of public NLP tasks.

A block has one `query: answer` line per example of one task; a test item is a block whose last answer is missing. No
question of a test item occurs in the pretraining text. Where the answer is composed or read (`translate`, `reverse`,
`who`), the query itself is held out; where the answer is a fact known by heart, the query is held out after the query
before it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from instructgpt_hf.lab import world


class Example(NamedTuple):
    """One line of a task: the query, its answer, and wrong answers of the same form (at least three)."""

    query: str
    answer: str
    wrong: tuple[str, ...]


def _fact(relation: str, rng: random.Random) -> Example:
    name = rng.choice(world.NAMES)
    answer = world.fact(name, relation)
    return Example(name, answer, tuple(value for value in world.VALUES[relation] if value != answer))


def _plural(rng: random.Random) -> Example:
    name = rng.choice(world.NAMES)
    others = rng.sample([other for other in world.NAMES if other != name], 2)
    answer, *wrong = (world.THINGS[word].plural for word in (name, *others))
    return Example(name, answer, (f"{name}s" if answer != f"{name}s" else f"{name}es", *wrong))


def _opposite(rng: random.Random) -> Example:
    pair, turned = rng.choice(world.OPPOSITES), rng.randrange(2)
    others = [word for other in world.OPPOSITES if other != pair for word in other]
    return Example(pair[turned], pair[1 - turned], tuple(rng.sample(others, 3)))


def _next(rng: random.Random) -> Example:
    number = rng.randrange(len(world.NUMBERS) - 1)
    near = [world.NUMBERS[other] for other in range(len(world.NUMBERS)) if other != number + 1]
    return Example(world.NUMBERS[number], world.NUMBERS[number + 1], tuple(rng.sample(near, 3)))


def _translate(rng: random.Random) -> Example:
    (name, other), (colour, tint) = rng.sample(world.NAMES, 2), rng.sample(world.COLOURS, 2)
    wrong = (world.translate(tint, name), world.translate(colour, other), world.translate(tint, other))
    return Example(f"{colour} {name}", world.translate(colour, name), wrong)


def _reverse(rng: random.Random) -> Example:
    first, second, third = rng.sample(world.NAMES, 3)
    orders = ((first, second, third), (second, third, first), (third, first, second))
    return Example(f"{first} {second} {third}", f"{third} {second} {first}", tuple(map(" ".join, orders)))


def _who(rng: random.Random) -> Example:
    people, things = rng.sample(world.PEOPLE, 4), rng.sample(world.NAMES, 3)
    facts = " ".join(f"{person} has the {thing}." for person, thing in zip(people, things, strict=False))
    asked = rng.randrange(3)
    return Example(f"{facts} The {things[asked]}", people.pop(asked), tuple(people))


TASKS: dict[str, Callable[[random.Random], Example]] = {
    **{relation: partial(_fact, relation) for relation in ("colour", "category", "place")},
    "plural": _plural,
    "opposite": _opposite,
    "next": _next,
    "translate": _translate,
    "reverse": _reverse,
    "who": _who,
}
COMPOSED = ("translate", "reverse", "who")
SHOTS = {task: 2 if task == "who" else 4 for task in TASKS}


def _held_out(task: str, before: str, query: str) -> bool:
    return world.held_out(f"{task}|{query}" if task in COMPOSED else f"{task}|{before}|{query}")


def _block(task: str, shots: int, rng: random.Random) -> list[Example]:
    """Draw `shots` distinct examples, none of them held out."""
    lines: list[Example] = []
    while len(lines) < shots:
        example = TASKS[task](rng)
        before = lines[-1].query if lines else ""
        if all(example.query != line.query for line in lines) and not _held_out(task, before, example.query):
            lines.append(example)
    return lines


def block_text(task: str, rng: random.Random) -> str:
    """One few-shot block of the pretraining text: three to eight lines of `task`, two to four of the long `who`."""
    shots = rng.randint(2, 4) if task == "who" else rng.randint(3, 8)
    return "\n".join(f"{line.query}: {line.answer}" for line in _block(task, shots, rng))


def _item(task: str, rng: random.Random) -> dict[str, Any]:
    """Draw a block of shots and a query that is held out after them, until both fit."""
    while True:
        lines = _block(task, SHOTS[task], rng)
        example = TASKS[task](rng)
        if _held_out(task, lines[-1].query, example.query) and example.query not in [line.query for line in lines]:
            break
    options = [example.answer, *rng.sample(example.wrong, 3)]
    rng.shuffle(options)
    shown = "".join(f"{line.query}: {line.answer}\n" for line in lines)
    return {
        "task": task,
        "prompt": f"{shown}{example.query}:",
        "options": [f" {option}" for option in options],
        "answer": options.index(example.answer),
    }


def tasks(seed: int, n: int) -> list[dict[str, Any]]:
    """Draw `n` test items, the nine tasks in turn.

    Returns:
        Dicts with `task` (its name), `prompt` (the shots and the query, ending in a colon), `options` (four texts;
        each begins with the space that follows the colon, so that `prompt + option` is the whole text) and `answer`
        (the index of the right option). Chance is 0.25 for the choice by mean log-probability per token, and about 0
        for greedy exact match up to the end of the line.
    """
    rng = random.Random(f"tasks {seed}")
    names = list(TASKS)
    return [_item(names[number % len(names)], rng) for number in range(n)]
