"""The pretraining text: prose about the micro-world, few-shot blocks and small talk, but no instructions."""

from __future__ import annotations

import random

from instructgpt_hf.lab import world
from instructgpt_hf.lab.statements import say, say_event, say_together
from instructgpt_hf.lab.tasks import TASKS, block_text

# Weights of the kinds of document, out of 100.
WEIGHTS = {"portrait": 24, "gathering": 10, "story": 8, "comparison": 4, "talk": 4, "block": 50}


def document(rng: random.Random) -> str:
    """One document of the pretraining text, 10 to 150 tokens long."""
    kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    if kind == "block":
        return block_text(rng.choice(list(TASKS)), rng)
    return _PROSE[kind](rng)


def documents(seed: int | str, count: int) -> list[str]:
    """`count` documents; different seeds give different text of the same distribution."""
    rng = random.Random(f"corpus {seed}")
    return [document(rng) for _ in range(count)]


def _portrait(rng: random.Random) -> str:
    """A few things, each with some of its facts."""
    sentences = []
    for name in rng.sample(world.NAMES, rng.randint(1, 4)):
        relations = rng.sample(world.RELATIONS, rng.randint(1, 4))
        named = rng.random() < 0.3
        if named:
            noun = f"{world.fact(name, 'colour')} {world.fact(name, 'category')}"
            sentences.append(f"The {name} is {world.article(noun)}.")
            relations = [relation for relation in relations if relation in ("size", "place")]
        for number, relation in enumerate(relations):
            pronoun = (named or number > 0) and rng.random() < 0.6
            sentences.append(say(name, relation, world.fact(name, relation), pronoun))
    return " ".join(sentences)


def _gathering(rng: random.Random) -> str:
    """Things that have something in common."""
    sentences = []
    for _ in range(rng.randint(1, 4)):
        relation = rng.choice(("category", "colour", "place", "size"))
        value = rng.choice(world.VALUES[relation])
        names = world.members(relation, value)
        sentences.append(say_together(rng.sample(names, rng.randint(2, 4)), relation, value))
    return " ".join(sentences)


def _story(rng: random.Random) -> str:
    """Made-up events, which need not agree with the facts."""
    sentences = []
    for _ in range(rng.randint(2, 5)):
        thing, other = rng.sample(world.NAMES, 2)
        place = rng.choice(world.PLACES) if rng.random() < 0.5 else None
        sentences.append(say_event(rng, thing, other if rng.random() < 0.6 else None, place))
    return " ".join(sentences)


def _comparison(rng: random.Random) -> str:
    """Pairs of things of different size."""
    sentences = []
    for _ in range(rng.randint(2, 4)):
        small = rng.choice(world.members("size", "small"))
        large = rng.choice(world.members("size", "large"))
        pair = (small, "smaller", large) if rng.random() < 0.5 else (large, "larger", small)
        sentences.append(f"The {pair[0]} is {pair[1]} than the {pair[2]}.")
    return " ".join(sentences)


def _talk(rng: random.Random) -> str:
    """People who say things to each other without asking for anything."""
    lines = []
    first, second = rng.sample(world.PEOPLE, 2)
    for number in range(rng.randint(2, 4)):
        name = rng.choice(world.NAMES)
        relation = rng.choice(world.RELATIONS)
        said = rng.choice(
            (
                say(name, relation, world.fact(name, relation)),
                say_event(rng, name, place=rng.choice(world.PLACES)),
                f"Hello, {name}!",
                f"Yes, {rng.choice(rng.choice(world.OPPOSITES))} and {rng.choice(rng.choice(world.OPPOSITES))}.",
            )
        )
        lines.append(f"{first if number % 2 == 0 else second}: {said}")
    return "\n".join(lines)


_PROSE = {
    "portrait": _portrait,
    "gathering": _gathering,
    "story": _story,
    "comparison": _comparison,
    "talk": _talk,
}
