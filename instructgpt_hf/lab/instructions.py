"""Instructions of the micro-world's users: drawing them, wording them as prompts, and parsing prompts.

The split that a prompt belongs to depends on its text alone, so no prompt of a training split appears in a test split,
whatever the seeds.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.lab import world
from instructgpt_hf.lab.statements import GREETINGS


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
        asked = ("category", "colour", "place")
        return Instruction(kind, (thing,), asked if rng.random() < 0.4 else tuple(rng.sample(world.RELATIONS, 2)))
    if kind == "question":
        return Instruction(kind, (thing,), (rng.choice(world.RELATIONS),))
    if kind == "check":
        relation = rng.choice(world.RELATIONS)
        value = world.fact(thing, relation) if rng.random() < 0.5 else rng.choice(world.VALUES[relation])
        return Instruction(kind, (thing,), (relation,), value)
    if kind == "list":
        relation = rng.choice(("category", "colour", "place"))
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


def _wording_key(instruction: Instruction) -> str:
    if instruction.kind in ("question", "list"):
        return f"{instruction.kind} {instruction.relations[0]}"
    return "describe two" if instruction.kind == "describe" and len(instruction.relations) == 2 else instruction.kind


def render(instruction: Instruction, wording: int = 0) -> str:
    """The prompt that asks for `instruction`, in one of its two wordings."""
    things, relations, value = instruction.things, instruction.relations, instruction.value
    fields = {
        "thing": things[0] if things else "",
        "other": things[1] if len(things) > 1 else value,
        "first": relations[0] if relations else "",
        "second": relations[-1] if relations else "",
        "order": relations[0] if relations else "",
        "greeting": relations[0] if relations else "",
        "value": value,
        "count": COUNTS.get(instruction.count, ""),
        "plural": world.CATEGORIES.get(value, ""),
        "predicate": _predicate(relations[0], value) if instruction.kind == "check" else "",
    }
    return WORDINGS[_wording_key(instruction)][wording].format(**fields)


def _predicate(relation: str, value: str) -> str:
    if relation == "place":
        return f"in the {value}"
    return world.article(value) if relation == "category" else value


def draw_prompts(rng: random.Random, count: int, test: bool) -> list[str]:
    """Draw `count` distinct prompts of the train or the test split."""
    prompts: dict[str, None] = {}  # ordered and distinct
    while len(prompts) < count:
        prompt = render(draw(rng), rng.randrange(2))
        if world.held_out(prompt) == test:
            prompts[prompt] = None
    return list(prompts)


_VALUE_OF = {value: relation for relation, values in world.VALUES.items() for value in values}
_COUNT_OF = {word: count for count, word in COUNTS.items()}
_CATEGORY_OF = {plural: name for name, plural in world.CATEGORIES.items()}
_CHOICES = {
    "thing": world.NAMES,
    "other": (*world.NAMES, *world.PLACES),
    "first": world.RELATIONS,
    "second": world.RELATIONS,
    "order": ("larger", "smaller"),
    "greeting": tuple(GREETINGS),
    "value": (*world.COLOURS, *world.PLACES),
    "count": tuple(_COUNT_OF),
    "plural": tuple(_CATEGORY_OF),
    "predicate": tuple(_predicate(relation, value) for value, relation in _VALUE_OF.items()),
}


def _pattern(wording: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", wording)
    pieces = [
        f"(?P<{part}>{'|'.join(_CHOICES[part])})" if number % 2 else re.escape(part)
        for number, part in enumerate(parts)
    ]
    return re.compile("".join(pieces))


_PATTERNS = [(key, _pattern(wording)) for key, wordings in WORDINGS.items() for wording in wordings]


def parse(prompt: str) -> Instruction:
    """Parse a prompt into the instruction it was rendered from.

    Raises:
        InstructGPTError: if the prompt is not one of the lab's.
    """
    for key, pattern in _PATTERNS:
        if match := pattern.fullmatch(prompt.strip()):
            return _from_fields(key, match.groupdict())
    raise InstructGPTError(
        f"The gold labeler only knows the lab's own instructions, not {prompt!r}: give it the `prompt` column of the "
        "lab's files, before any prompt template."
    )


def _from_fields(key: str, fields: dict[str, str]) -> Instruction:
    kind, _, detail = key.partition(" ")
    things = tuple(fields[name] for name in ("thing", "other") if fields.get(name) in world.THINGS)
    if kind == "describe":
        return Instruction(kind, things, (fields["first"], fields["second"]) if detail else
                           ("category", "colour", "place"))  # fmt: skip
    if kind == "question":
        return Instruction(kind, things, (detail,))
    if kind == "check":
        value = fields["predicate"].split()[-1]
        return Instruction(kind, things, (_VALUE_OF[value],), value)
    if kind == "list":
        value = _CATEGORY_OF[fields["plural"]] if detail == "category" else fields["value"]
        return Instruction(kind, (), (detail,), value, _COUNT_OF[fields["count"]])
    if kind == "write":
        return Instruction(kind, things, (), "" if len(things) == 2 else fields["other"])
    return Instruction(kind, things, (fields["order" if kind == "compare" else "greeting"],))
