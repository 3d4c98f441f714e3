"""The sentences of the micro-world: writing facts as sentences, and reading sentences back into claims.

Demonstrations, the pretraining text and the gold labeler share these forms, so that the labeler can tell a sentence
from unordered words, and a true statement from a false one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from typing import NamedTuple

from instructgpt_hf.lab import world


class Claim(NamedTuple):
    """One statement: `subject` has `value` for `relation`. `larger` and `smaller` have another thing as value."""

    subject: str
    relation: str
    value: str

    @property
    def true(self) -> bool:
        if self.relation in ("larger", "smaller"):
            sizes = world.fact(self.subject, "size"), world.fact(self.value, "size")
            return sizes == (("large", "small") if self.relation == "larger" else ("small", "large"))
        return world.fact(self.subject, self.relation) == self.value


class Sentence(NamedTuple):
    """A sentence that was read: its kind, the claims it makes and the things and places it mentions.

    `kind` is "claim", "event", "greeting" or "courtesy", or None if it is not a sentence of this world; `opening` is
    "yes", "no", a greeting or "".
    """

    kind: str | None
    claims: tuple[Claim, ...] = ()
    words: frozenset[str] = frozenset()
    opening: str = ""


COURTESIES = ("Of course!", "Gladly!", "I hope this helps.", "Have a nice day!")
OPENERS, CLOSERS = COURTESIES[:2], COURTESIES[2:]
GREETINGS = {"hello": "Hello", "good morning": "Good morning", "goodbye": "Goodbye", "thanks": "Thank you"}
VERBS = ("sees", "finds", "draws", "likes", "wants")
SPOTS = ("near", "behind", "under", "beside")


def _one_of(words: Iterable[str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_THING = f"(?:{_one_of(world.NAMES)})"
_PLACE = f"(?:{_one_of(world.PLACES)})"
_COLOUR = f"(?:{_one_of(world.COLOURS)})"
_SIZE = f"(?:{_one_of(world.SIZES)})"
_NAMES = rf"[Tt]he {_THING}(?:(?:, the {_THING})* and the {_THING})?"
_SUBJECT = rf"(?P<subject>{_NAMES}|[Ii]t)"
_NOUN = rf"(?:(?P<size>{_SIZE}) )?(?:(?P<colour>{_COLOUR}) )?(?P<category>{_one_of(world.CATEGORIES)})"
_PLURALS = {plural: name for name, plural in world.CATEGORIES.items()}
_CLAIM = re.compile(
    rf"(?:(?P<opening>Yes|No), )?{_SUBJECT} (?:is|are) (?:(?:a|an) {_NOUN}|(?P<plural>{_one_of(_PLURALS)})"
    rf"|(?P<only_colour>{_COLOUR})|(?P<only_size>{_SIZE})|in the (?P<place>{_PLACE})"
    rf"|(?P<order>larger|smaller) than the (?P<other>{_THING}))\."
)
_EVENT = re.compile(
    rf"(?:(?:{_one_of(world.PEOPLE)}) (?:{_one_of(VERBS)}) the {_THING}(?: and the {_THING})?"
    rf"|The {_THING} is (?:{_one_of(SPOTS)}) the {_THING})(?: in the {_PLACE})?\."
)
_EVENT_NOUN = re.compile(rf"\b[Tt]he ({_THING})\b")
_GREETING = re.compile(rf"(?P<greeting>{_one_of(GREETINGS.values())}), (?:dear )?(?P<thing>{_THING})!")
_MENTION = re.compile(rf"\b(?:{_THING}|{_PLACE})\b")


def split_sentences(text: str) -> list[str]:
    """Split text into sentences with their closing marks; the last one may have none."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]


def read(sentence: str, subject: str | None = None) -> Sentence:
    """Read one sentence with its closing mark; "It" refers to `subject`, the subject of the sentence before."""
    if sentence in COURTESIES:
        return Sentence("courtesy")
    mentioned = frozenset(_MENTION.findall(sentence))
    if match := _GREETING.fullmatch(sentence):
        return Sentence("greeting", (), mentioned, match["greeting"])
    if match := _CLAIM.fullmatch(sentence):
        return _read_claims(match, mentioned, subject)
    nouns = _EVENT_NOUN.findall(sentence)
    if _EVENT.fullmatch(sentence) and len(set(nouns)) == len(nouns):
        return Sentence("event", (), mentioned)
    return Sentence(None, (), mentioned)


def _read_claims(match: re.Match[str], mentioned: frozenset[str], subject: str | None) -> Sentence:
    phrase = match["subject"]
    pronoun = phrase.lower() == "it"
    if pronoun and subject is None:
        return Sentence(None, (), mentioned)
    subjects = [str(subject)] if pronoun else re.findall(rf"the ({_THING})", phrase.lower())
    plural_verb = f"{phrase} are " in match.string
    # These predicates have the same form for one subject and for several.
    shared = any(match[group] for group in ("only_colour", "only_size", "place", "order"))
    if plural_verb != (len(subjects) > 1) or (match["plural"] is not None) != (plural_verb and not shared):
        return Sentence(None, (), mentioned)
    said = {
        "category": match["category"] or _PLURALS.get(match["plural"] or ""),
        "colour": match["colour"] or match["only_colour"],
        "size": match["size"] or match["only_size"],
        "place": match["place"],
        match["order"] or "larger": match["other"],
    }
    claims = tuple(Claim(name, relation, value) for name in subjects for relation, value in said.items() if value)
    return Sentence("claim", claims, mentioned | frozenset(subjects), (match["opening"] or "").lower())


def say(subject: str, relation: str, value: str, pronoun: bool = False) -> str:
    """`The fox is red.` for (fox, colour, red); with `pronoun`, `It is red.`"""
    return f"{'It' if pronoun else f'The {subject}'} is {predicate(relation, value)}."


def predicate(relation: str, value: str, plural: bool = False) -> str:
    """What follows `is` (or, with `plural`, `are`) in a statement of `relation` = `value`."""
    if relation == "place":
        return f"in the {value}"
    if relation == "category":
        return world.CATEGORIES[value] if plural else world.article(value)
    return value


def say_together(names: list[str], relation: str, value: str) -> str:
    """`The owl and the hen are birds.`, or the singular form for one name."""
    if len(names) == 1:
        return say(names[0], relation, value)
    return f"{world.capital(world.join_names(names))} are {predicate(relation, value, plural=True)}."


def say_event(rng: random.Random, things: list[str], place: str | None) -> str:
    """A sentence of fiction, neither true nor false, that mentions one or two things and the place."""
    where = f" in the {place}" if place else ""
    if len(things) > 1 and rng.random() < 0.5:
        return f"The {things[0]} is {rng.choice(SPOTS)} the {things[1]}{where}."
    return f"{rng.choice(world.PEOPLE)} {rng.choice(VERBS)} {world.join_names(things)}{where}."
