"""A recipe: one YAML file per stage, whose keys are the fields of the stage's dataclasses, and the command line.

All problems of all files are reported at once, before any model or dataset is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from instructgpt_hf.config.catalog import STAGES, copy_recipe, find_recipe, list_recipes, recipe_folder
from instructgpt_hf.config.parsing import COMMAND_LINE, Mismatch, Override, coerce, parse_overrides, read_mapping
from instructgpt_hf.config.rules import range_violation, violations
from instructgpt_hf.config.schema import REQUIRED, Setting, reserved, stage_classes, stage_settings
from instructgpt_hf.errors import InstructGPTError, Problems, nearest

__all__ = [
    "STAGES",
    "Recipe",
    "Setting",
    "StageSettings",
    "copy_recipe",
    "list_recipes",
    "load_recipe",
    "recipe_folder",
    "stage_settings",
]

# What these name differs from stage to stage, so one value cannot be meant for all of them.
_NEEDS_STAGE = {
    "dataset_config",
    "dataset_name",
    "dataset_test_split",
    "dataset_train_split",
    "model_name_or_path",
    "model_revision",
}


@dataclass
class StageSettings:
    """The settings of one stage.

    Attributes:
        stage: `"sft"`, `"reward"` or `"ppo"`.
        data_args: where the data come from (`SFTArguments`, `RewardArguments` or `PPOArguments`).
        model_args: the `ModelConfig`.
        training_args: the `SFTConfig`, `RewardConfig` or `PPOConfig`.
        values: what the recipe and the command line set, by key, of the right types.
    """

    stage: str
    data_args: Any
    model_args: Any
    training_args: Any
    values: dict[str, Any] = field(default_factory=dict)

    def changed(self) -> dict[str, Any]:
        """The settings whose value differs from this package's default."""
        known = stage_settings(self.stage)
        return {key: value for key, value in self.values.items() if value != known[key].default}

    def defaults_with_source(self) -> dict[str, tuple[Any, str]]:
        """Default and source of every setting that this package adds, or whose default it changes."""
        known = stage_settings(self.stage).values()
        return {item.name: (item.default, item.source) for item in known if item.source is not None}


@dataclass
class Recipe:
    """A recipe whose settings have been checked.

    Attributes:
        name: the name of its folder.
        folder: where its files are.
        stages: the settings by stage, in the order of training.
    """

    name: str
    folder: Path
    stages: dict[str, StageSettings]


class _Given(NamedTuple):
    """A value as it was written, and where."""

    value: Any
    file: str
    label: str
    words: bool = False


def load_recipe(
    name_or_path: str | Path,
    overrides: Sequence[str] = (),
    stages: Iterable[str] = STAGES,
    output_dir: str | Path | None = None,
) -> Recipe:
    """Read and check a recipe.

    Args:
        name_or_path: name of a shipped recipe, a folder with `sft.yaml`, `reward.yaml` and `ppo.yaml`, or, for a
            single stage, its YAML file.
        overrides: words of the command line: `--ppo.beta 0.05` for one stage, `--seed 3` for every stage that has the
            setting. They win over the files, and a later word over an earlier one.
        stages: the stages to read.
        output_dir: folder of the run, `runs/<name>` by default; stage `s` trains in its subfolder `s`.

    Raises:
        InstructGPTError: lists every problem of the files and of the command line, with file, key, value and rule.
    """
    chosen = set(stages)
    wanted = [stage for stage in STAGES if stage in chosen]
    found = find_recipe(name_or_path)
    if found.is_file() and len(wanted) != 1:
        raise InstructGPTError(f"{found}: is one stage's file; give the folder with the files of all stages")
    folder = found.parent if found.is_file() else found
    name = folder.resolve().name
    problems = Problems(f"The settings of recipe {name!r} cannot be used:")
    given: dict[str, dict[str, _Given]] = {}
    unreadable: set[str] = set()
    for stage in wanted:
        path = found if found.is_file() else folder / f"{stage}.yaml"
        values = read_mapping(path, problems)
        if values is None:
            unreadable.add(stage)
        given[stage] = {key: _Given(value, str(path), key) for key, value in (values or {}).items()}
    _apply_overrides(given, parse_overrides(overrides, problems), problems)
    typed = {stage: _typed(stage, given[stage], problems) for stage in wanted}
    for stage in wanted:
        if stage not in unreadable:
            _check_rules(stage, given[stage], typed[stage], found, problems)
    _check_templates(given, typed, problems)
    problems.raise_if_any(limit=100)
    target = Path(output_dir) if output_dir is not None else Path("runs") / name
    built = {stage: _build(stage, typed[stage], target / stage, problems) for stage in wanted}
    problems.raise_if_any(limit=100)
    return Recipe(name, folder, built)


def _apply_overrides(given: dict[str, dict[str, _Given]], overrides: list[Override], problems: Problems) -> None:
    """Put the settings of the command line in place of those of the files."""
    for item in overrides:
        if item.stage is not None and item.stage not in given:
            loaded = " and ".join(given)
            problems.add(f"{COMMAND_LINE}: {item.option} = {item.value!r}: this command reads only stage {loaded}")
            continue
        if item.stage is not None:
            targets = [item.stage]
        else:
            targets = [stage for stage in given if item.key in stage_settings(stage)]
        if item.stage is None and len(targets) > 1 and item.key in _NEEDS_STAGE:
            named = " or ".join(f"--{stage}.{item.key}" for stage in targets)
            problems.add(f"{COMMAND_LINE}: {item.option} = {item.value!r}: differs from stage to stage; write {named}")
            continue
        # A key that no stage has is left to the check of the first stage that refuses it by name, or of any.
        refusing = [stage for stage in given if item.key in reserved(stage)]
        for stage in targets or refusing[:1]:
            given[stage][item.key] = _Given(item.value, COMMAND_LINE, item.option, words=True)
        if not targets and not refusing:
            keys = {key for stage in given for key in stage_settings(stage)}
            hint = _with_hint("is not a setting of any stage of this command", nearest(item.key, keys))
            problems.add(f"{COMMAND_LINE}: {item.option} = {item.value!r}: {hint}")


def _typed(stage: str, given: dict[str, _Given], problems: Problems) -> dict[str, Any]:
    """The values that are fit for their key; all others are added to the problems."""
    known, forbidden, typed = stage_settings(stage), reserved(stage), {}
    for key, item in given.items():
        try:
            if key in forbidden:
                raise Mismatch(forbidden[key])
            if key not in known:
                raise Mismatch(_unknown(stage, key))
            typed[key] = _fit(known[key], item)
        except Mismatch as mismatch:
            problem = f"{item.file}: {item.label} = {item.value!r}: {mismatch}"
            # A setting of the command line that goes to several stages is wrong once.
            if problem not in problems.items:
                problems.add(problem)
    return typed


def _fit(setting: Setting, item: _Given) -> Any:
    value = item.value
    if value is True and item.words and bool not in _types(setting.hint):
        raise Mismatch("needs a value")
    value = coerce(value, setting.hint, item.words)
    if setting.choices and value is not None and value not in setting.choices:
        hint = nearest(str(value), setting.choices)
        raise Mismatch(_with_hint(f"must be one of {', '.join(setting.choices)}", hint if "did you" in hint else ""))
    rule = range_violation(setting.name, value)
    if rule is not None:
        raise Mismatch(rule)
    return value


def _types(hint: Any) -> tuple[Any, ...]:
    return (hint, *getattr(hint, "__args__", ()))


def _unknown(stage: str, key: str) -> str:
    others = [other for other in STAGES if other != stage and key in stage_settings(other)]
    if others:
        return f"belongs to {' or '.join(f'{other}.yaml' for other in others)}"
    return _with_hint("is not a setting of this stage", nearest(key, stage_settings(stage)))


def _with_hint(rule: str, hint: str) -> str:
    return f"{rule}; {hint}" if hint else rule


def _check_rules(stage: str, given: dict[str, _Given], typed: dict[str, Any], found: Path, problems: Problems) -> None:
    """Required settings, and rules that involve several settings. Rules with a setting that is bad are skipped."""
    file = str(found if found.is_file() else found / f"{stage}.yaml")
    for key in REQUIRED[stage]:
        if key not in given or typed.get(key, "") is None:
            problems.add(f"{file}: {key}: is required and missing")
    known = stage_settings(stage)
    bad = set(given) - set(typed)
    values = {key: item.default for key, item in known.items() if key not in bad} | typed
    for violation in violations(stage, values):
        source = next((given[key].file for key in violation.keys if key in given), file)
        problems.add(f"{source}: {violation.key} = {values[violation.key]!r}: {violation.rule}")


def _check_templates(
    given: dict[str, dict[str, _Given]], typed: dict[str, dict[str, Any]], problems: Problems
) -> None:
    """Later stages render prompts as the SFT stage does; naming another template is an error."""
    if "sft" not in typed or ("prompt_template" in given["sft"] and "prompt_template" not in typed["sft"]):
        return
    first = typed["sft"].get("prompt_template", stage_settings("sft")["prompt_template"].default)
    for stage in ("reward", "ppo"):
        other = typed.get(stage, {}).get("prompt_template")
        if other is not None and other != first:
            problems.add(
                f"{given[stage]['prompt_template'].file}: prompt_template = {other!r}: must be that of sft.yaml, "
                f"{first!r}; leave it out"
            )


def _build(stage: str, typed: dict[str, Any], folder: Path, problems: Problems) -> StageSettings:
    """The dataclasses of a stage. What only TRL or transformers refuses is added to the problems."""
    known = stage_settings(stage)
    arguments, model, training = stage_classes(stage)

    def build(owner: type, **more: Any) -> Any:
        values = {key: value for key, value in typed.items() if known[key].owner == owner.__name__}
        try:
            return owner(**values, **more)
        except (ValueError, TypeError, ImportError, OSError) as error:
            problems.add(f"{stage}.yaml: {owner.__name__} refuses these settings: {error}")
            return None

    return StageSettings(stage, build(arguments), build(model), build(training, output_dir=str(folder)), typed)
