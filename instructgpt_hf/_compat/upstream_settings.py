"""The settings of a stage without importing TRL, for the help texts."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MODULES = ("model", "training", "ppo", "settings")  # of `config`, which import TRL or those that do
# Where a config declares its fields, its bases first.
_TRAINING = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
)
_CONFIGS = {
    "SFTConfig": (*_TRAINING, ("trl", "trainer/sft_config.py", "SFTConfig")),
    "RewardConfig": (*_TRAINING, ("trl", "trainer/reward_config.py", "RewardConfig")),
    "RLOOConfig": (*_TRAINING, ("trl", "trainer/rloo_config.py", "RLOOConfig")),
    "ModelConfig": (("trl", "trainer/model_config.py", "ModelConfig"),),
}


@contextlib.contextmanager
def importable_quickly() -> Iterator[Any]:
    """The module `config.settings` inside the block, without importing TRL, which takes seconds, for it.

    Names, defaults and help texts of the settings are right; nothing else of the module may be used.

    Cause: TRL's configs cannot be imported without torch.
    Goes when: they can.
    Relies on: the files and classes of `_CONFIGS`, with fields as `name: type = default` or `= field(...)`.
    """
    names = [f"instructgpt_hf.config.{name}" for name in _MODULES]
    if "trl" in sys.modules or any(name in sys.modules for name in names):
        yield importlib.import_module("instructgpt_hf.config.settings")
        return
    stand_ins = {name: types.ModuleType(name) for name in ("trl", "transformers", "transformers.trainer_utils")}
    vars(stand_ins["trl"]).update({name: _config(name, files) for name, files in _CONFIGS.items()})
    vars(stand_ins["transformers.trainer_utils"])["SchedulerType"] = str
    before = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        yield importlib.import_module("instructgpt_hf.config.settings")
    finally:
        package = sys.modules["instructgpt_hf.config"]
        for name in names:
            sys.modules.pop(name, None)
            vars(package).pop(name.rpartition(".")[2], None)
        for name, module in before.items():
            sys.modules.pop(name)
            sys.modules.update({name: module} if module is not None else {})


def _config(name: str, files: tuple[tuple[str, str, str], ...]) -> type:
    """A dataclass with the fields of an upstream config, all of type Any."""
    declared: dict[str, Any] = {}
    for package, file, owner in files:
        declared |= _fields(package, file, owner)
    return dataclasses.make_dataclass(name, [(key, Any, item) for key, item in declared.items()], kw_only=True)


def _fields(package: str, file: str, owner: str) -> dict[str, Any]:
    """The fields of one class in a source file, in order."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return {}
    tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    found = next(item for item in tree.body if isinstance(item, ast.ClassDef) and item.name == owner)
    # Defaults with a name of the class; of several, the innermost is that of newer libraries.
    assigned = [item for item in ast.walk(found) if isinstance(item, ast.Assign)]
    named = {ast.unparse(item.targets[0]): item.value for item in assigned}
    return {
        item.target.id: _field(item.value, named)
        for item in found.body
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.target, ast.Name)
        and item.value is not None
        and "ClassVar" not in ast.unparse(item.annotation)
    }


def _field(value: ast.expr, named: dict[str, ast.expr]) -> Any:
    """The dataclass field that an expression makes."""
    given = {"default": value}
    if isinstance(value, ast.Call) and ast.unparse(value.func) in ("field", "dataclasses.field"):
        given = {word.arg: word.value for word in value.keywords if word.arg}
    init = given.get("init")
    options: dict[str, Any] = {"init": init is None or _value(init) is not False}
    metadata = given.get("metadata")
    if isinstance(metadata, ast.Dict):
        pairs = zip(metadata.keys, metadata.values, strict=True)
        options["metadata"] = {_value(key): _value(item) for key, item in pairs if key is not None}
    factory = given.get("default_factory")
    if factory is not None:
        made = (
            _value(factory.body)
            if isinstance(factory, ast.Lambda)
            else {"list": [], "dict": {}}.get(ast.unparse(factory))
        )
        return dataclasses.field(default_factory=lambda: made, **options)
    default = given.get("default", ast.Constant(None))
    default = _value(named.get(ast.unparse(default), default))
    if isinstance(default, (list, dict, set)):
        return dataclasses.field(default_factory=lambda: default, **options)
    return dataclasses.field(default=default, **options)


def _value(expression: ast.expr) -> Any:
    """The value of a literal; of anything else its source text."""
    try:
        return ast.literal_eval(expression)
    except ValueError:
        return ast.unparse(expression)
