"""The micro-world: its words and its facts, which are the same for every seed.

Every thing has one category, colour, size and place. The table is arbitrary, so a model can know it only from the
pretraining text, and every statement about the world is simply true or false.
"""

from __future__ import annotations

import random
import zlib
from typing import NamedTuple


class Thing(NamedTuple):
    """One thing of the world with its four facts; the field names are the names of the relations."""

    name: str
    plural: str
    category: str
    colour: str
    size: str
    place: str


_TABLE = """
    fox     foxes    animal  red     small  meadow      owl      owls      bird     grey    small  barn
    cow     cows     animal  brown   large  meadow      crow     crows     bird     black   small  garden
    dog     dogs     animal  yellow  large  garden      duck     ducks     bird     green   small  harbour
    pig     pigs     animal  white   large  barn        hen      hens      bird     brown   small  kitchen
    goat    goats    animal  black   large  market      swan     swans     bird     white   large  harbour
    mouse   mice     animal  grey    small  cellar      wren     wrens     bird     blue    small  meadow
    apple   apples   fruit   green   small  cellar      hammer   hammers   tool     black   small  attic
    pear    pears    fruit   yellow  small  kitchen     saw      saws      tool     grey    large  cellar
    plum    plums    fruit   blue    small  market      axe      axes      tool     red     large  barn
    cherry  cherries fruit   red     small  garden      rake     rakes     tool     green   large  garden
    peach   peaches  fruit   white   small  attic       brush    brushes   tool     yellow  small  market
    fig     figs     fruit   brown   small  harbour     knife    knives    tool     white   small  kitchen
    ball    balls    toy     blue    large  garden      hat      hats      garment  yellow  large  market
    doll    dolls    toy     white   small  attic       coat     coats     garment  black   large  attic
    kite    kites    toy     red     large  meadow      scarf    scarves   garment  green   small  kitchen
    drum    drums    toy     yellow  large  cellar      boot     boots     garment  brown   large  barn
    puzzle  puzzles  toy     green   small  kitchen     dress    dresses   garment  blue    large  cellar
    whistle whistles toy     black   small  harbour     glove    gloves    garment  red     small  harbour
    cart    carts    vehicle brown   large  barn        cup      cups      dish     blue    small  kitchen
    boat    boats    vehicle white   large  harbour     bowl     bowls     dish     grey    large  attic
    bus     buses    vehicle red     large  market      plate    plates    dish     white   large  barn
    truck   trucks   vehicle grey    large  garden      spoon    spoons    dish     black   small  market
    train   trains   vehicle green   large  meadow      jug      jugs      dish     brown   large  cellar
    sled    sleds    vehicle blue    small  attic       glass    glasses   dish     grey    small  meadow
"""


_WORDS = _TABLE.split()
THINGS = {_WORDS[start]: Thing(*_WORDS[start : start + 6]) for start in range(0, len(_WORDS), 6)}
NAMES = tuple(THINGS)
CATEGORIES = {  # with their plurals
    "animal": "animals", "bird": "birds", "fruit": "fruits", "tool": "tools", "toy": "toys", "garment": "garments",
    "vehicle": "vehicles", "dish": "dishes",
}  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "grey")
SIZES = ("small", "large")
PLACES = ("meadow", "barn", "garden", "harbour", "market", "kitchen", "attic", "cellar")
VALUES: dict[str, tuple[str, ...]] = {"category": tuple(CATEGORIES), "colour": COLOURS, "size": SIZES, "place": PLACES}
RELATIONS = tuple(VALUES)
PEOPLE = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gwen", "Hugo")
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
OPPOSITES = (
    ("hot", "cold"), ("wet", "dry"), ("old", "new"), ("fast", "slow"), ("hard", "soft"), ("full", "empty"),
    ("high", "low"), ("long", "short"), ("loud", "quiet"), ("light", "dark"), ("open", "closed"), ("rich", "poor"),
    ("sharp", "blunt"), ("thick", "thin"), ("early", "late"), ("happy", "sad"),
)  # fmt: skip


def fact(name: str, relation: str) -> str:
    """The true value of `relation` (category, colour, size or place) for the thing called `name`."""
    value: str = getattr(THINGS[name], relation)
    return value


def members(relation: str, value: str) -> list[str]:
    """The names of all things whose `relation` has this `value`, in the table's order."""
    return [name for name in NAMES if fact(name, relation) == value]


def article(word: str) -> str:
    """`word` with its indefinite article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def join_names(names: list[str]) -> str:
    """`["owl", "hen", "crow"]` as `the owl, the hen and the crow`."""
    phrases = [f"the {name}" for name in names]
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def capital(text: str) -> str:
    """`text` with its first letter in upper case and the rest as it is."""
    return text[:1].upper() + text[1:]


def held_out(key: str) -> bool:
    """Whether `key` belongs to the test split: about one key in ten, the same ones for every seed.

    CRC-32 rather than `hash`, whose value for a string changes from one Python process to the next.
    """
    return zlib.crc32(key.encode()) % 10 == 0


_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
_INVENTED = [first + second for first in _SYLLABLES for second in _SYLLABLES if first != second]
_DRAWN = random.Random("the invented language").sample(_INVENTED, len(NAMES) + len(COLOURS))
# One distinct word of the invented language for each thing and colour.
LEXICON = dict(zip([*NAMES, *COLOURS], _DRAWN, strict=True))


def translate(colour: str, name: str) -> str:
    """`red fox` in the invented language, where the noun comes first."""
    return f"{LEXICON[name]} {LEXICON[colour]}"
