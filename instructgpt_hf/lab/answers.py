"""Answers by labelers of varying care: the demonstrations, and the completions that are ranked.

A careless answer has the faults people make: a wrong fact, a part forgotten, one thing too many, no full stop, no
courtesy, something said twice, something nobody asked. Fine-tuning on such demonstrations gives middling answers,
which leaves room for learning from comparisons.
"""

from __future__ import annotations

import random

from instructgpt_hf.lab import world
from instructgpt_hf.lab.instructions import Instruction
from instructgpt_hf.lab.statements import (
    CLOSERS,
    GREETINGS,
    OPENERS,
    predicate,
    say,
    say_event,
    say_together,
    split_sentences,
)

# The labelers who write demonstrations: how careful each of them is, from 0 (never) to 1 (always).
LABELER_CARE = (0.3, 0.45, 0.6, 0.75, 0.9)
# About 30 tokens: the longest answer a labeler writes.
MAX_WORDS = 24


def demonstrate(instruction: Instruction, rng: random.Random) -> str:
    """An answer by one of the labelers, drawn at random."""
    return answer(instruction, rng.choice(LABELER_CARE), rng)


def answer(instruction: Instruction, care: float, rng: random.Random) -> str:
    """An answer written with `care` between 0 and 1; with 1, every fact is right and nothing is forgotten."""
    sentences = _CONTENT[instruction.kind](instruction, care, rng)
    if rng.random() < 0.25 * (1 - care):
        sentences.append(_aside(rng))
    if rng.random() < 0.15 * (1 - care):
        sentences.append(rng.choice(sentences))
    if rng.random() < 0.1 + 0.6 * care:
        if rng.random() < 0.5:
            sentences.insert(0, rng.choice(OPENERS))
        else:
            sentences.append(rng.choice(CLOSERS))
    while len(" ".join(sentences).split()) > MAX_WORDS:
        sentences.pop()
    text = " ".join(sentences)
    if rng.random() < 0.2 * (1 - care):
        text = text[:1].lower() + text[1:]
    if rng.random() < 0.2 * (1 - care):
        text = text[:-1]
    return text


def _careful(care: float, rng: random.Random) -> bool:
    """Draw whether the labeler avoids one possible fault."""
    return rng.random() < 0.5 + 0.5 * care


def _value(name: str, relation: str, care: float, rng: random.Random) -> str:
    """The value a labeler states: the true one, or any."""
    return world.fact(name, relation) if _careful(care, rng) else rng.choice(world.VALUES[relation])


def _aside(rng: random.Random) -> str:
    name, relation = rng.choice(world.NAMES), rng.choice(world.RELATIONS)
    return say(name, relation, world.fact(name, relation))


def _describe(instruction: Instruction, care: float, rng: random.Random) -> list[str]:
    name = instruction.things[0]
    asked = [relation for relation in instruction.relations if _careful(care, rng)] or [instruction.relations[0]]
    said = {relation: _value(name, relation, care, rng) for relation in asked}
    sentences = []
    if "category" in said and "colour" in said:
        sentences.append(say(name, "category", f"{said.pop('colour')} {said.pop('category')}"))
    for relation, value in said.items():
        sentences.append(say(name, relation, value, pronoun=bool(sentences)))
    return sentences


def _question(instruction: Instruction, care: float, rng: random.Random) -> list[str]:
    name, relation = instruction.things[0], instruction.relations[0]
    if rng.random() < 0.15 * (1 - care):
        relation = rng.choice(world.RELATIONS)
    return [say(name, relation, _value(name, relation, care, rng))]


def _check(instruction: Instruction, care: float, rng: random.Random) -> list[str]:
    name, relation = instruction.things[0], instruction.relations[0]
    claimed = _value(name, relation, care, rng)
    yes = (claimed == instruction.value) if _careful(care, rng) else rng.random() < 0.5
    return [f"{'Yes' if yes else 'No'}, the {name} is {predicate(relation, claimed)}."]


def _list(instruction: Instruction, care: float, rng: random.Random) -> list[str]:
    relation, value = instruction.relations[0], instruction.value
    right = world.members(relation, value)
    count = instruction.count if _careful(care, rng) else instruction.count + rng.choice((-1, 1))
    names = rng.sample(right, min(count, len(right)))
    for number in range(len(names)):
        # Lists have several members: each is right more often than a single fact.
        if not _careful(care, rng) and rng.random() < 0.5:
            names[number] = rng.choice([name for name in world.NAMES if name not in names])
    return [say_together(names, relation, value)]


def _write(instruction: Instruction, care: float, rng: random.Random) -> list[str]:
    words = [word for word in (*instruction.things, instruction.value) if word]
    if not _careful(care, rng):
        words.pop(rng.randrange(2))
        words.append(rng.choice([name for name in world.NAMES if name not in words]))
    places = [word for word in words if word in world.PLACES]
    things = [word for word in words if word not in world.PLACES]
    place = places[0] if places else (rng.choice(world.PLACES) if rng.random() < 0.3 else None)
    return [say_event(rng, things, place)]


def _compare(instruction: Instruction, care: float, rng: random.Random) -> list[str]:
    order = instruction.relations[0]
    large, small = sorted(instruction.things, key=lambda name: world.fact(name, "size"))
    first, second = (large, small) if order == "larger" else (small, large)
    if not _careful(care, rng):
        first, second = rng.sample([first, second], 2)
    return [f"The {first} is {order} than the {second}."]


def _greet(instruction: Instruction, care: float, rng: random.Random) -> list[str]:
    greeting = instruction.relations[0] if _careful(care, rng) else rng.choice(list(GREETINGS))
    name = instruction.things[0] if _careful(care, rng) else rng.choice(world.NAMES)
    return [f"{GREETINGS[greeting]}, {'dear ' if rng.random() < 0.5 else ''}{name}!"]


_CONTENT = {
    "describe": _describe, "question": _question, "check": _check, "list": _list, "write": _write,
    "compare": _compare, "greet": _greet,
}  # fmt: skip


def spoil(text: str, rng: random.Random) -> str:
    """Damage `text` with a fault that is typical of models rather than of people."""
    words = text.split()
    kind = rng.choice(("shuffle", "cut", "repeat", "stutter", "garble", "echo"))
    if kind in ("repeat", "echo"):
        return f"{text} {rng.choice(split_sentences(text)) if kind == 'repeat' else _aside(rng)}"
    if kind == "shuffle":
        rng.shuffle(words)
    elif kind == "cut":
        words = words[: rng.randint(1, max(1, len(words) - 1))]
    elif kind == "stutter":
        start = rng.randrange(len(words))
        words[start:start] = [words[start]] * rng.randint(1, 6)
    else:
        number = rng.randrange(len(words))
        words[number] = rng.choice(list(world.LEXICON.values()))
    return " ".join(words)
