"""Self-describing settings: dataclass fields that carry everything known about a setting.

A class with settings declares its own ones with `setting`, upstream's with another default with `changed`, and what is
known about all other upstream fields in a class attribute `upstream`, a mapping from field name to `Upstream`.
`settings_of` reads all three. Standard library only.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from fnmatch import fnmatchcase
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

from instructgpt_hf.config.ranges import Range
from instructgpt_hf.errors import nearest


def setting(
    default: Any,
    help: str,
    source: str,
    valid: Range | None = None,
    *,
    choices: Sequence[Any] = (),
    neutral: bool = False,
    adjustable: bool = False,
) -> Any:
    """A dataclass field of this package's own.

    Args:
        default: the default; a dict or list is copied for every instance.
        help: what the setting does, with its unit.
        source: section of the paper (Ouyang et al. 2022) that states the default, or `"ours"` with the reason.
        valid: the allowed range. None (not set) is always allowed.
        choices: the allowed values, if they are few; `<name>` at the end of one stands for any text.
        neutral: changes only what is logged, saved or published, so a finished stage stays valid.
        adjustable: may be changed when a stopped run continues from its checkpoint.
    """
    metadata: dict[str, Any] = {"help": help, "source": source, "choices": list(choices), "valid": valid}
    metadata |= {"neutral": neutral, "adjustable": adjustable}
    if isinstance(default, (dict, list)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def changed(upstream: type, name: str, default: Any, source: str, valid: Range | None = None, **known: bool) -> Any:
    """The field `name` of the dataclass `upstream` with another default; help and choices stay upstream's.

    The other arguments are those of `setting`. What they leave open is taken from the class's mapping `upstream`.
    """
    metadata = upstream.__dataclass_fields__[name].metadata  # type: ignore[attr-defined]
    return setting(default, metadata.get("help", ""), source, valid, choices=metadata.get("choices") or (), **known)


class Refusal(NamedTuple):
    """Why an upstream field may not be set, whether Python programs are refused too, and values without effect."""

    rule: str
    in_programs: bool = False
    off: tuple[Any, ...] = ()


class Upstream(NamedTuple):
    """Attributes of a setting whose field and default are TRL's or transformers'; see `setting`.

    `hint` is the type to accept where upstream's annotation is too narrow.
    """

    valid: Range | None = None
    neutral: bool = False
    adjustable: bool = False
    hint: Any = None
    refusal: Refusal | None = None


def refused(rule: str, *off: Any) -> Upstream:
    """A field that neither recipes nor programs may change, except to the values `off`, which have no effect."""
    return Upstream(refusal=Refusal(rule, True, off))


def not_in_recipes(rule: str) -> Upstream:
    """A field that recipes may not set; programs that use the trainers themselves may."""
    return Upstream(refusal=Refusal(rule))


class Setting(NamedTuple):
    """A field of a stage's dataclass and what is known about it; see `setting`.

    `owner` is the name of the dataclass; `source` is None for the fields that this package neither adds nor changes.
    """

    name: str
    owner: str
    hint: Any
    default: Any
    source: str | None
    choices: tuple[Any, ...]
    valid: Range | None
    neutral: bool
    adjustable: bool
    refusal: Refusal | None
    help: str

    def violation(self, value: Any) -> str | None:
        """The rule that a value of the right type breaks, or None. None (not set) breaks no rule."""
        if value is None:
            return None
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        if self.valid is not None and not self.valid.holds(value):
            return self.valid.rule
        if self.choices and not any(_is_choice(value, choice) for choice in self.choices):
            return not_a_choice(value, self.choices)
        return None


def _is_choice(value: Any, choice: Any) -> bool:
    start, name, _ = str(choice).partition("<name>")
    return bool(value == choice or (name and str(value).startswith(start) and value != start))


def not_a_choice(value: Any, choices: Sequence[Any]) -> str:
    """The message for a value that is not among the choices; names the closest one."""
    names = [str(choice) for choice in choices]
    hint = nearest(str(value), names)
    return f"must be one of {', '.join(names)}" + (f"; {hint}" if hint.startswith("did you mean") else "")


def known_upstream(owner: type) -> dict[str, Upstream]:
    """The mappings `upstream` of the class and its bases, merged; a subclass overrides its bases."""
    merged: dict[str, Upstream] = {}
    for base in reversed(owner.__mro__):
        merged |= vars(base).get("upstream", {})
    return merged


@cache
def settings_of(owner: type) -> Mapping[str, Setting]:
    """Every field of a dataclass that can be passed to it, refused ones included, in the order of the class."""
    known, hints = known_upstream(owner), typing.get_type_hints(owner)
    settings = [_setting(item, owner, hints[item.name], known) for item in fields(owner) if item.init]
    return MappingProxyType({item.name: item for item in settings})


def _setting(item: Field[Any], owner: type, hint: Any, known: Mapping[str, Upstream]) -> Setting:
    """One field with what the class knows about it; an exact name in `known` wins over a pattern."""
    by_pattern = (about for name, about in known.items() if fnmatchcase(item.name, name))
    about = known.get(item.name) or next(by_pattern, Upstream())
    metadata = item.metadata
    return Setting(
        name=item.name,
        owner=owner.__name__,
        hint=about.hint or hint,
        default=item.default_factory() if item.default_factory is not MISSING else item.default,
        source=metadata.get("source"),
        choices=tuple(metadata.get("choices") or ()),
        valid=metadata.get("valid") or about.valid,
        neutral=metadata.get("neutral", False) or about.neutral,
        adjustable=metadata.get("adjustable", False) or about.adjustable,
        refusal=about.refusal,
        help=metadata.get("help", ""),
    )
