"""Reading a YAML file of settings, with an error for what PyYAML passes over in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from instructgpt_hf.errors import Problems


def read_mapping(path: Path, problems: Problems) -> dict[str, Any] | None:
    """The keys and values of the file, or None if it cannot be read; what is wrong with it is added to `problems`.

    A key that stands twice is a problem: PyYAML would keep the last one. An empty file has no settings.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        present = [item.name for item in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        problems.add(f"{path}: not found" + (f"; the folder has {', '.join(sorted(present))}" if present else ""))
        return None
    except (OSError, UnicodeDecodeError) as error:
        problems.add(f"{path}: cannot be read as UTF-8 text ({error})")
        return None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
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
            problems.add(f"{path}: {key.value}: stands twice, again in line {key.start_mark.line + 1}; keep one")
        seen.add(key.value)
    for key in [key for key in values if not isinstance(key, str)]:
        problems.add(f"{path}: {key!r} = {values.pop(key)!r}: a key must be text")
    return values
