"""Recipes: one YAML file per stage, whose keys are fields of the stage's dataclasses; the command line overrides them.

All problems of all files are reported at once, before any model or dataset is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from instructgpt_hf.artifacts import STAGES
from instructgpt_hf.config.catalog import find_recipe
from instructgpt_hf.config.data import DataArguments
from instructgpt_hf.config.parsing import COMMAND_LINE, Mismatch, Override, fit, parse_overrides, read_mapping
from instructgpt_hf.config.rules import violations
from instructgpt_hf.config.settings import REQUIRED, refusals, stage_classes, stage_settings
from instructgpt_hf.errors import InstructGPTError, Problems, nearest

if TYPE_CHECKING:
    from instructgpt_hf.config.model import ModelConfig
    from instructgpt_hf.config.training import StageConfig

# Settings whose value differs from stage to stage, so the command line must name the stage.
_NEEDS_STAGE = {"model_name_or_path", "model_revision", *(item.name for item in fields(DataArguments))}

Data = TypeVar("Data", bound=DataArguments)
Training = TypeVar("Training", bound="StageConfig")


@dataclass
class StageSettings(Generic[Data, Training]):
    """The settings of one stage, for example `StageSettings[PPOArguments, PPOConfig]`.

    `values` holds what the recipe and the command line set, by key, in the settings' types. `reward_stage` is False
    where the recipe has no `reward.yaml` and scores with reward functions alone.
    """

    stage: str
    data_args: Data
    model_args: ModelConfig
    training_args: Training
    values: dict[str, Any] = field(default_factory=dict)
    reward_stage: bool = True

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
    """A recipe whose settings have been checked: the name of its folder, and settings by stage, in training order.

    The reward stage is missing where the recipe has no `reward.yaml`.
    """

    name: str
    folder: Path
    stages: dict[str, StageSettings[Any, Any]]


class _Given(NamedTuple):
    """A value as it was written, with its file, its label in messages, and whether it is from the command line."""

    value: Any
    file: str
    label: str
    from_shell: bool = False


def run_folder(recipe: str, output_dir: str | Path | None) -> Path:
    """Folder of a run: `output_dir`, or by default `runs/<recipe>`."""
    return Path("runs") / recipe if output_dir is None else Path(output_dir)


def load_recipe(
    name_or_path: str | Path,
    overrides: Sequence[str] = (),
    stages: Iterable[str] = STAGES,
    output_dir: str | Path | None = None,
) -> Recipe:
    """Read and check a recipe.

    Args:
        name_or_path: name of a shipped recipe, a folder with a YAML file per stage, or one stage's YAML file. A folder
            without `reward.yaml` has no reward stage: PPO scores with its `reward_functions` or `reward_model_path`.
        overrides: words of the command line: `--ppo.beta 0.05` for one stage, `--seed 3` for every stage that has the
            setting. They win over the files, and a later word over an earlier one.
        stages: the stages to read.
        output_dir: folder of the run, `runs/<name>` by default; stage `s` trains in its subfolder `s`.

    Raises:
        InstructGPTError: lists every problem of the files and of the command line, with file, key, value and rule.
    """
    chosen = set(stages)
    wanted = [stage for stage in STAGES if stage in chosen]
    source = find_recipe(name_or_path)
    if source.is_file() and len(wanted) != 1:
        raise InstructGPTError(f"{source}: is one stage's file; give the folder with the files of all stages")
    folder = source.parent if source.is_file() else source
    files = {stage: source if source.is_file() else folder / f"{stage}.yaml" for stage in wanted}
    name = folder.resolve().name
    problems = Problems(f"The settings of recipe {name!r} cannot be used:")
    reward_stage = (folder / "reward.yaml").is_file()
    if not reward_stage and "ppo" in wanted and len(wanted) > 1:
        files.pop("reward", None)
        wanted = list(files)
    read = {stage: read_mapping(path, problems) for stage, path in files.items()}
    given = {
        stage: {key: _Given(value, str(files[stage]), key) for key, value in (values or {}).items()}
        for stage, values in read.items()
    }
    _apply_overrides(given, parse_overrides(overrides, problems), problems)
    typed = {stage: _typed(stage, given[stage], problems) for stage in wanted}
    if not reward_stage and "reward" in chosen and "reward" not in wanted:
        _check_reward_source(folder, given["ppo"], problems)
    # Without a reward model of its own, the PPO stage by itself takes the one in the run's folder.
    reward_stage = reward_stage or "reward_functions" not in given.get("ppo", {})
    for stage in wanted:
        if read[stage] is not None:
            _check_rules(stage, given[stage], typed[stage], str(files[stage]), problems, reward_stage)
    _check_templates(given, typed, problems)
    problems.raise_if_any(limit=100)
    target = run_folder(name, output_dir)
    built = {stage: _build(stage, typed[stage], target / stage, problems, reward_stage) for stage in wanted}
    problems.raise_if_any(limit=100)
    return Recipe(name, folder, built)


def _apply_overrides(given: dict[str, dict[str, _Given]], overrides: list[Override], problems: Problems) -> None:
    """Replace settings of the files by those of the command line."""
    for item in overrides:
        problem = f"{COMMAND_LINE}: {item.option} = {item.value!r}: "
        targets = [stage for stage in given if item.key in stage_settings(stage)]
        # A key that no stage has is reported by the first stage that refuses it by name.
        targets = targets or [stage for stage in given if item.key in refusals(stage)][:1]
        if item.stage is not None and item.stage not in given:
            problems.add(f"{problem}this command reads only stage {' and '.join(given)}")
        elif item.stage is None and len(targets) > 1 and item.key in _NEEDS_STAGE:
            named = " or ".join(f"--{stage}.{item.key}" for stage in targets)
            problems.add(f"{problem}differs from stage to stage; write {named}")
        elif item.stage is None and not targets:
            hint = nearest(item.key, {key for stage in given for key in stage_settings(stage)})
            problems.add(problem + _with_hint("is not a setting of any stage of this command", hint))
        else:
            for stage in targets if item.stage is None else [item.stage]:
                given[stage][item.key] = _Given(item.value, COMMAND_LINE, item.option, from_shell=True)


def _typed(stage: str, given: dict[str, _Given], problems: Problems) -> dict[str, Any]:
    """The values that fit their keys; all others are added to the problems."""
    known, forbidden, typed = stage_settings(stage), refusals(stage), {}
    for key, item in given.items():
        try:
            if key in forbidden:
                raise Mismatch(forbidden[key])
            if key not in known:
                raise Mismatch(_unknown(stage, key))
            typed[key] = fit(known[key], item.value, item.from_shell)
        except Mismatch as mismatch:
            problem = f"{item.file}: {item.label} = {item.value!r}: {mismatch}"
            # A setting of the command line that goes to several stages is reported once.
            if problem not in problems.items:
                problems.add(problem)
    return typed


def _unknown(stage: str, key: str) -> str:
    others = [other for other in STAGES if other != stage and key in stage_settings(other)]
    if others:
        return f"belongs to {' or '.join(f'{other}.yaml' for other in others)}"
    return _with_hint("is not a setting of this stage", nearest(key, stage_settings(stage)))


def _with_hint(rule: str, hint: str) -> str:
    return f"{rule}; {hint}" if hint else rule


def _check_reward_source(folder: Path, given: dict[str, _Given], problems: Problems) -> None:
    """A recipe without a reward stage must name what PPO scores with."""
    if not any(given[key].value for key in ("reward_functions", "reward_model_path") if key in given):
        read_mapping(folder / "reward.yaml", problems)
        problems.items[-1] += "; without it, ppo.yaml must set reward_functions or reward_model_path"


def _check_rules(
    stage: str, given: dict[str, _Given], typed: dict[str, Any], file: str, problems: Problems, reward_stage: bool
) -> None:
    """Check required settings, and the rules across settings that do not read a bad one."""
    for key in REQUIRED[stage]:
        if key not in given or typed.get(key, "") is None:
            problems.add(f"{file}: {key}: is required and missing")
    bad = set(given) - set(typed)
    values = {key: item.default for key, item in stage_settings(stage).items() if key not in bad} | typed
    values["reward_stage"] = reward_stage  # no setting: whether the recipe has a reward.yaml
    for violation in violations(stage, values):
        source = next((given[key].file for key in violation.keys if key in given), file)
        problems.add(f"{source}: {violation.key} = {values[violation.key]!r}: {violation.rule}")


def _check_templates(
    given: dict[str, dict[str, _Given]], typed: dict[str, dict[str, Any]], problems: Problems
) -> None:
    """Later stages use the prompt template of the SFT stage; another one is a problem."""
    if "sft" not in typed or ("prompt_template" in given["sft"] and "prompt_template" not in typed["sft"]):
        return
    first = typed["sft"].get("prompt_template", stage_settings("sft")["prompt_template"].default)
    for stage in ("reward", "ppo"):
        other = typed.get(stage, {}).get("prompt_template")
        if other not in (None, first):
            file = given[stage]["prompt_template"].file
            problems.add(f"{file}: prompt_template = {other!r}: must be that of sft.yaml, {first!r}; leave it out")


def _build(
    stage: str, typed: dict[str, Any], folder: Path, problems: Problems, reward_stage: bool
) -> StageSettings[Any, Any]:
    """Construct the dataclasses of a stage; what only TRL or transformers refuses is added to the problems."""
    known = stage_settings(stage)

    def build(owner: type, **more: Any) -> Any:
        values = {key: value for key, value in typed.items() if known[key].owner == owner.__name__}
        try:
            return owner(**values, **more)
        except (ValueError, TypeError, ImportError, OSError) as error:
            problems.add(f"{stage}.yaml: {owner.__name__} refuses these settings: {error}")
            return None

    data, model, training = stage_classes(stage)
    return StageSettings(
        stage, build(data), build(model), build(training, output_dir=str(folder)), typed, reward_stage
    )
