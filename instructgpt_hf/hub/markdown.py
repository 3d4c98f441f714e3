"""The templates' jinja2 environment, and tidying of the Markdown they render."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).parent / "templates"


def environment() -> Environment:
    """The jinja2 environment of this package's templates; an unknown variable in a template is an error."""
    import jinja2

    result = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=False,  # Markdown, not HTML; the filters below keep values inside their cell or code span.
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    result.filters["cell"] = _cell
    result.filters["python"] = lambda value: json.dumps(value, ensure_ascii=False)
    return result


def _cell(value: Any) -> str:
    """`value` as one cell of a Markdown table."""
    if isinstance(value, (bool, dict, list)):
        value = json.dumps(value, sort_keys=True, ensure_ascii=False)
    elif isinstance(value, int):
        value = f"{value:,}"
    return " ".join(str("none" if value is None else value).split()).replace("|", "\\|")


def squeeze(text: str) -> str:
    """`text` without trailing blanks and without consecutive empty lines."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.strip().splitlines()))
