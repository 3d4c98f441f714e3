"""The pretraining text: prose about the micro-world, few-shot blocks and small talk, but no instructions."""

from __future__ import annotations

import random

from instructgpt_hf.lab import world
from instructgpt_hf.lab.statements import say, say_event, say_together
from instructgpt_hf.lab.tasks import TASKS, block_text


def documents(seed: int | str, count: int) -> list[str]:
    """`count` documents of 10 to 150 tokens; different seeds give different text of the same distribution."""
    rng = random.Random(f"corpus {seed}")
    return [rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0](rng) for _ in range(count)]


def _portrait(rng: random.Random) -> str:
    """A few things, each with some of its facts."""
    sentences = []
    for name in rng.sample(world.NAMES, rng.randint(1, 4)):
        relations = rng.sample(world.RELATIONS, rng.randint(1, 4))
        named = rng.random() < 0.3
        if named:
            noun = f"{world.fact(name, 'colour')} {world.fact(name, 'category')}"
            sentences.append(say(name, "category", noun))
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
        sentences.append(say_together(rng.sample(world.members(relation, value), rng.randint(2, 4)), relation, value))
    return " ".join(sentences)


def _story(rng: random.Random) -> str:
    """Made-up events, which need not agree with the facts."""
    sentences = []
    for _ in range(rng.randint(2, 5)):
        things = rng.sample(world.NAMES, 2)
        place = rng.choice(world.PLACES) if rng.random() < 0.5 else None
        sentences.append(say_event(rng, things if rng.random() < 0.6 else things[:1], place))
    return " ".join(sentences)


def _comparison(rng: random.Random) -> str:
    """Pairs of things of different size."""
    sentences = []
    for _ in range(rng.randint(2, 4)):
        small, large = (rng.choice(world.members("size", size)) for size in ("small", "large"))
        first, order, second = (small, "smaller", large) if rng.random() < 0.5 else (large, "larger", small)
        sentences.append(f"The {first} is {order} than the {second}.")
    return " ".join(sentences)


def _talk(rng: random.Random) -> str:
    """People who say things to each other without asking for anything."""
    lines = []
    first, second = rng.sample(world.PEOPLE, 2)
    for number in range(rng.randint(2, 4)):
        name, relation = rng.choice(world.NAMES), rng.choice(world.RELATIONS)
        remarks = (
            say(name, relation, world.fact(name, relation)),
            say_event(rng, [name], rng.choice(world.PLACES)),
            f"Hello, {name}!",
            f"Yes, {rng.choice(rng.choice(world.OPPOSITES))} and {rng.choice(rng.choice(world.OPPOSITES))}.",
        )
        lines.append(f"{first if number % 2 == 0 else second}: {rng.choice(remarks)}")
    return "\n".join(lines)


def _block(rng: random.Random) -> str:
    return block_text(rng.choice(list(TASKS)), rng)


# Weights of the kinds of document, out of 100.
WEIGHTS = {_portrait: 24, _gathering: 10, _story: 8, _comparison: 4, _talk: 4, _block: 50}
