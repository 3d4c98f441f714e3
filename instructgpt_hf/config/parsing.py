"""Values from YAML files and the command line, checked against the type annotations of the settings.

PyYAML reads `2e-5` as text and does not know the type that a key needs; TRL's parser takes YAML's values as they are.
"""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from instructgpt_hf.artifacts import STAGES
from instructgpt_hf.config.fields import Setting, not_a_choice
from instructgpt_hf.errors import Problems

COMMAND_LINE = "command line"


class Mismatch(Exception):
    """A value does not fit; the message is the rule it breaks."""


def fit(setting: Setting, value: Any, from_shell: bool = False) -> Any:
    """Convert a value to the setting's type; raises `Mismatch` if type, range or choices do not fit. See `coerce`."""
    if value is True and from_shell and bool not in _members(setting.hint):
        raise Mismatch("needs a value")
    value = coerce(value, setting.hint, from_shell)
    if (rule := setting.violation(value)) is not None:
        raise Mismatch(rule)
    return value


def coerce(value: Any, hint: Any, from_shell: bool = False) -> Any:
    """Convert `value` to the type `hint`.

    Args:
        value: a value from YAML; from the command line one word, or a list of several words.
        hint: a type annotation of the dataclasses: bool, int, float, str, an enum, a literal, list, dict, tuple, None,
            or a union of them.
        from_shell: whether the value is from the command line, where everything is text.

    Raises:
        Mismatch: if it does not fit. Nothing is rounded or truncated; the text `2e-5` is a number.
    """
    members = _members(hint)
    if value is None or (from_shell and isinstance(value, str) and value.lower() in ("none", "null")):
        if type(None) in members:
            return None
        raise Mismatch(f"must be {_describe(members)}, and it is empty")
    enums = any(isinstance(member, type) and issubclass(member, Enum) for member in members)
    members = [member for member in members if not (enums and member is str)]
    text = str in members and isinstance(value, str) and not value.startswith(("[", "{")) and "," not in value
    if from_shell and text:  # one word is text, not a list of one
        members = [member for member in members if (get_origin(member) or member) not in (list, tuple)]
    for member in sorted(members, key=_rank):
        try:
            return _coerce_one(value, member, from_shell)
        except Mismatch as mismatch:
            if enums and isinstance(value, str):
                raise mismatch
    raise Mismatch(f"must be {_describe(members)}")


def _members(hint: Any) -> list[Any]:
    """The types of a union, or the one type."""
    return list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]


def _rank(member: Any) -> int:
    """Order in which types are tried: a flag before numbers, and text last, which fits every word."""
    return {bool: 0, int: 1, float: 2, str: 4}.get(member, 3)


def _coerce_one(value: Any, member: Any, from_shell: bool) -> Any:
    container = get_origin(member) or member
    if container in (list, tuple):
        return _sequence(value, member, container, from_shell)
    if isinstance(value, list) and from_shell:
        raise Mismatch("takes one value")
    if container is dict:
        return _mapping(value)
    if container is Literal:
        return _one_of(value, get_args(member))
    if member is bool:
        return _flag(value, from_shell)
    if member in (int, float):
        return _number(value, member)
    if isinstance(member, type) and issubclass(member, Enum):
        return _one_of(value, [item.value for item in member])
    if member is Any or (member is str and isinstance(value, str)):
        return value
    raise Mismatch("does not fit")


def _one_of(value: Any, choices: Sequence[Any]) -> Any:
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    raise Mismatch(not_a_choice(value, choices))


def _flag(value: Any, from_shell: bool) -> bool:
    if isinstance(value, bool):
        return value
    if from_shell and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise Mismatch("must be true or false")


def _number(value: Any, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise Mismatch("must be a number")
    if isinstance(value, str):
        try:
            value = int(value) if kind is int and value.strip().lstrip("+-").isdigit() else float(value)
        except ValueError:
            raise Mismatch("must be a number") from None
    if not math.isfinite(value):
        raise Mismatch("must be a finite number")
    if kind is int and value != int(value):
        raise Mismatch("must be a whole number")
    return kind(value)


def _sequence(value: Any, member: Any, container: type, from_shell: bool) -> Any:
    if from_shell and isinstance(value, str):
        value = _from_json(value) if value.startswith("[") else value.split(",")
    if not isinstance(value, (list, tuple)):
        raise Mismatch("must be a list")
    kinds = [kind for kind in get_args(member) if kind is not Ellipsis] or [Any]
    if container is tuple and len(kinds) != len(value):
        raise Mismatch(f"must be a list of {len(kinds)} values")
    kinds = kinds if container is tuple else kinds * len(value)
    return container(coerce(item, kind, from_shell) for item, kind in zip(value, kinds, strict=True))


def _mapping(value: Any) -> dict[str, Any]:
    value = _from_json(value) if isinstance(value, str) and value.startswith("{") else value
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _json_number(item) for key, item in value.items()}
    raise Mismatch("must be a mapping of names to values")


def _json_number(value: Any) -> Any:
    """Text with an exponent, such as `2e-5`, as a number: inside a mapping no annotation says what is one."""
    exponent = isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value)
    return float(value) if exponent else value


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise Mismatch(f"must be valid JSON ({error.msg} at character {error.pos + 1})") from None


def _describe(members: list[Any]) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    names |= {list: "a list", tuple: "a list", dict: "a mapping of names to values"}
    described = [
        " or ".join(str(choice).lower() for choice in get_args(member))
        if get_origin(member) is Literal
        else names.get(get_origin(member) or member, getattr(member, "__name__", str(member)))
        for member in members
    ]
    return " or ".join(sorted(dict.fromkeys(described), key="null".__eq__))


class Override(NamedTuple):
    """A setting of the command line. `value` is one word, a list of several words, or True for a bare flag."""

    stage: str | None
    key: str
    value: Any

    @property
    def option(self) -> str:
        return f"--{self.stage}.{self.key}" if self.stage else f"--{self.key}"


def parse_overrides(words: Sequence[str], problems: Problems) -> list[Override]:
    """Split the words of the command line into settings; unreadable ones are added to `problems`."""
    overrides: list[Override] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            rule = "not a setting; write --key value, or --ppo.key value for one stage"
            problems.add(f"{COMMAND_LINE}: {word!r}: {rule}")
            continue
        name, equals, text = word[2:].partition("=")
        values = [text] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        stage, dot, key = name.rpartition(".")
        value: Any = True if not values else values[0] if len(values) == 1 else values
        if dot and stage not in STAGES:
            problems.add(f"{COMMAND_LINE}: --{name}: {stage!r} is not a stage; choose from {', '.join(STAGES)}")
        else:
            overrides.append(Override(stage or None, key.replace("-", "_"), value))
    return overrides


def read_mapping(path: Path, problems: Problems) -> dict[str, Any] | None:
    """Keys and values of a YAML file, or None if it cannot be read; what is wrong with it is added to `problems`.

    A duplicate key is a problem, of which PyYAML would keep the last value. An empty file has no settings.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        node, values = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except FileNotFoundError:
        present = [item.name for item in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        problems.add(f"{path}: not found" + (f"; the folder has {', '.join(sorted(present))}" if present else ""))
        return None
    except (OSError, UnicodeDecodeError) as error:
        problems.add(f"{path}: cannot be read as UTF-8 text ({error})")
        return None
    except yaml.YAMLError as error:
        problems.add(f"{path}: is not valid YAML: {' '.join(str(error).split())}")
        return None
    if values is None:
        return {}
    if not isinstance(values, dict):
        problems.add(f"{path}: must hold `key: value` lines, and holds a {type(values).__name__}")
        return None
    seen: set[str] = set()
    for key, _ in node.value if node is not None else []:
        if key.value in seen:
            problems.add(f"{path}: {key.value}: duplicate key, also on line {key.start_mark.line + 1}; keep one")
        seen.add(key.value)
    for key in [key for key in values if not isinstance(key, str)]:
        problems.add(f"{path}: {key!r} = {values.pop(key)!r}: a key must be text")
    return values
