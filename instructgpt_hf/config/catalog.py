"""The catalog of shipped recipes: list, find and copy them. Loads neither torch nor TRL."""

from __future__ import annotations

import shutil
from pathlib import Path

from instructgpt_hf.artifacts import STAGES, atomic_folder
from instructgpt_hf.errors import InstructGPTError, nearest


def recipes_root() -> Path:
    """The folder of the shipped recipes: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def list_recipes() -> list[tuple[str, str, Path]]:
    """Name, description (the first line of text of its README) and folder of every shipped recipe."""
    return [(item.name, _description(item), item) for item in sorted(recipes_root().iterdir()) if _is_recipe(item)]


def recipe_folder(name: str) -> Path:
    """The folder of the shipped recipe `name`.

    Raises:
        InstructGPTError: if no recipe has that name.
    """
    known = {item[0]: item[2] for item in list_recipes()}
    if name not in known:
        hint = nearest(name, known)
        raise InstructGPTError(f"{name}: no recipe of this name; {hint} (`instructgpt-hf recipes list`)")
    return known[name]


def find_recipe(name_or_path: str | Path) -> Path:
    """The folder or YAML file of a recipe; a local folder with stage files wins over a shipped recipe's name.

    Raises:
        InstructGPTError: if it is neither a local path nor the name of a shipped recipe.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file() or _is_recipe(path):
        return path
    if path.is_dir():
        raise InstructGPTError(f"{path}: holds none of {', '.join(f'{stage}.yaml' for stage in STAGES)}")
    if len(path.parts) > 1 or path.suffix in (".yaml", ".yml"):
        raise InstructGPTError(f"{path}: not found")
    return recipe_folder(str(name_or_path))


def copy_recipe(name: str, target: str | Path) -> Path:
    """Copy the shipped recipe `name` into the folder `target` and return that folder.

    Raises:
        InstructGPTError: if there is no such recipe, or `target` exists and is not an empty folder.
    """
    source, folder = recipe_folder(name), Path(target).expanduser()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InstructGPTError(f"{folder}: exists already and is not an empty folder; choose another one")
    with atomic_folder(folder) as temporary:
        for file in sorted(source.iterdir()):
            if file.suffix in (".yaml", ".md"):
                shutil.copyfile(file, temporary / file.name)
    return folder


def _is_recipe(folder: Path) -> bool:
    return any((folder / f"{stage}.yaml").is_file() for stage in STAGES)


def _description(folder: Path) -> str:
    readme = folder / "README.md"
    lines = readme.read_text(encoding="utf-8").splitlines() if readme.is_file() else []
    return next((line.strip() for line in lines if line.strip() and not line.startswith("#")), "")
