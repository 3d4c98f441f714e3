"""Self-describing settings: dataclass fields that carry all that is known of them."""

from __future__ import annotations

from dataclasses import MISSING, Field, field
from typing import Any


def setting(default: Any, help: str, source: str, choices: list[str] | None = None) -> Any:
    """A dataclass field with its help text and where its default comes from.

    Args:
        default: the default; a dict or list is copied for every instance.
        help: what the setting does, with its unit.
        source: section of the paper (Ouyang et al. 2022) that states the default, or `"ours"` with the reason.
        choices: the values allowed, if they are few.
    """
    metadata: dict[str, Any] = {"help": help, "source": source, **({"choices": choices} if choices else {})}
    if isinstance(default, (dict, list)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def changed(upstream: type, name: str, default: Any, source: str) -> Any:
    """The field `name` of the dataclass `upstream` with another default; help and choices stay upstream's."""
    original: Field[Any] = upstream.__dataclass_fields__[name]  # type: ignore[attr-defined]
    metadata = original.metadata
    return setting(default, metadata.get("help", ""), source, metadata.get("choices"))


def default_of(item: Field[Any]) -> Any:
    """The default of a dataclass field that has one."""
    return item.default_factory() if item.default_factory is not MISSING else item.default
