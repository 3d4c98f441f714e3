"""Instructions of the micro-world's users: drawing them, wording them as prompts, and parsing prompts.

The split that a prompt belongs to depends on its text alone, so no prompt of a training split appears in a test split,
whatever the seeds.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.lab import world
from instructgpt_hf.lab.statements import GREETINGS, predicate


@dataclass(frozen=True)
class Instruction:
    """One request.

    Attributes:
        kind: describe, question, check, list, write, compare or greet.
        things: the one or two things it is about; empty for `list`.
        relations: the relations asked for; for `compare` "larger" or "smaller"; for `greet` the greeting.
        value: `check` and `list`: the value in question; `write`: the place to mention.
        count: `list`: how many things are wanted.
    """

    kind: str
    things: tuple[str, ...] = ()
    relations: tuple[str, ...] = ()
    value: str = ""
    count: int = 0


# Weights of the kinds, out of 100.
WEIGHTS = {"describe": 20, "question": 20, "check": 12, "list": 18, "write": 12, "compare": 10, "greet": 8}
# Relations of a whole description, and those that things are listed by.
DESCRIBED = ("category", "colour", "place")
COUNTS = {2: "two", 3: "three", 4: "four"}
WORDINGS: dict[str, tuple[str, ...]] = {
    "describe": ("Describe the {thing}.", "Tell me about the {thing}."),
    "describe two": ("Describe the {first} and the {second} of the {thing}.",
                     "Tell me the {first} and the {second} of the {thing}."),
    "question colour": ("What colour is the {thing}?", "Which colour does the {thing} have?"),
    "question size": ("What size is the {thing}?", "How large is the {thing}?"),
    "question place": ("Where is the {thing}?", "In which place is the {thing}?"),
    "question category": ("What is the {thing}?", "What kind of thing is the {thing}?"),
    "check": ("Is the {thing} {predicate}?", "Is it true that the {thing} is {predicate}?"),
    "list category": ("List {count} {plural}.", "Name {count} {plural}."),
    "list colour": ("List {count} {value} things.", "Name {count} {value} things."),
    "list place": ("List {count} things in the {value}.", "Name {count} things in the {value}."),
    "write": ("Write a sentence with {thing} and {other}.", "Make up a sentence about the {thing} and the {other}."),
    "compare": ("Which is {order}, the {thing} or the {other}?", "Is the {thing} or the {other} {order}?"),
    "greet": ("Say {greeting} to the {thing}.", "How do you say {greeting} to the {thing}?"),
}  # fmt: skip


def draw(rng: random.Random) -> Instruction:
    """Draw a random instruction, its kind with the probabilities of `WEIGHTS`."""
    kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    thing, other = rng.sample(world.NAMES, 2)
    if kind == "describe":
        relations = DESCRIBED if rng.random() < 0.4 else tuple(rng.sample(world.RELATIONS, 2))
        return Instruction(kind, (thing,), relations)
    if kind == "question":
        return Instruction(kind, (thing,), (rng.choice(world.RELATIONS),))
    if kind == "check":
        relation = rng.choice(world.RELATIONS)
        value = world.fact(thing, relation) if rng.random() < 0.5 else rng.choice(world.VALUES[relation])
        return Instruction(kind, (thing,), (relation,), value)
    if kind == "list":
        relation = rng.choice(DESCRIBED)
        return Instruction(kind, (), (relation,), rng.choice(world.VALUES[relation]), rng.choice(list(COUNTS)))
    if kind == "write":
        if rng.random() < 0.5:
            return Instruction(kind, (thing,), (), rng.choice(world.PLACES))
        return Instruction(kind, (thing, other))
    if kind == "compare":
        while world.fact(thing, "size") == world.fact(other, "size"):
            other = rng.choice(world.NAMES)
        return Instruction(kind, (thing, other), (rng.choice(("larger", "smaller")),))
    return Instruction(kind, (thing,), (rng.choice(list(GREETINGS)),))


def render(instruction: Instruction, wording: int = 0) -> str:
    """The prompt that asks for `instruction`, in one of its two wordings."""
    kind, things, value = instruction.kind, instruction.things, instruction.value
    first, second = (*instruction.relations, "", "")[:2]
    key = f"{kind} {first}" if kind in ("question", "list") else kind
    if kind == "describe" and len(instruction.relations) == 2:
        key = "describe two"
    fields = {
        **dict.fromkeys(("first", "order", "greeting"), first),
        "second": second,
        "thing": things[0] if things else "",
        "other": things[1] if len(things) > 1 else value,
        "value": value,
        "count": COUNTS.get(instruction.count, ""),
        "plural": world.CATEGORIES.get(value, ""),
        "predicate": predicate(first, value) if kind == "check" else "",
    }
    return WORDINGS[key][wording].format(**fields)


def draw_prompts(rng: random.Random, count: int, test: bool) -> list[str]:
    """Draw `count` distinct prompts of the train or the test split."""
    prompts: dict[str, None] = {}  # ordered and distinct
    while len(prompts) < count:
        prompt = render(draw(rng), rng.randrange(2))
        if world.held_out(prompt) == test:
            prompts[prompt] = None
    return list(prompts)


def parse(prompt: str) -> Instruction:
    """The instruction that a prompt was rendered from.

    Raises:
        InstructGPTError: if the prompt is not one of the lab's.
    """
    if instruction := _by_prompt().get(prompt.strip()):
        return instruction
    raise InstructGPTError(
        f"The gold labeler only knows the lab's own instructions, not {prompt!r}: give it the `prompt` column of the "
        "lab's files, before any prompt template."
    )


@cache
def _by_prompt() -> dict[str, Instruction]:
    return {render(instruction, wording): instruction for instruction in _every_instruction() for wording in (0, 1)}


def _every_instruction() -> Iterator[Instruction]:
    for relation in DESCRIBED:
        for value, count in itertools.product(world.VALUES[relation], COUNTS):
            yield Instruction("list", (), (relation,), value, count)
    for thing in world.NAMES:
        yield Instruction("describe", (thing,), DESCRIBED)
        for relations in itertools.product(world.RELATIONS, repeat=2):
            yield Instruction("describe", (thing,), relations)
        for relation, values in world.VALUES.items():
            yield Instruction("question", (thing,), (relation,))
            yield from (Instruction("check", (thing,), (relation,), value) for value in values)
        yield from (Instruction("write", (thing,), (), place) for place in world.PLACES)
        yield from (Instruction("greet", (thing,), (greeting,)) for greeting in GREETINGS)
        for other in world.NAMES:
            yield Instruction("write", (thing, other))
            yield from (Instruction("compare", (thing, other), (order,)) for order in ("larger", "smaller"))
