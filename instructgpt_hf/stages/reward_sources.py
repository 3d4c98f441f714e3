"""The reward models and functions that a recipe names, found and checked before any model is loaded."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedTokenizerBase

from instructgpt_hf.artifacts import (
    StageArtifact,
    code_fingerprint,
    file_fingerprint,
    model_fingerprint,
    source_place,
    vocabulary_fingerprint,
)
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.errors import InstructGPTError, Problems, nearest
from instructgpt_hf.models.loading import load_tokenizer
from instructgpt_hf.models.origins import resolve_source
from instructgpt_hf.models.reward_model import Scorer
from instructgpt_hf.models.scoring import TextRewardModel
from instructgpt_hf.stages.inputs import FinishedStage, check_vocabulary, previous_stage
from instructgpt_hf.stages.run import StageRun
from instructgpt_hf.trainers.ppo.functions import RewardFunction
from instructgpt_hf.trainers.ppo.rewards import Reward


@dataclass(frozen=True)
class RewardSource(FinishedStage):
    """A finished reward stage that the policy is scored with.

    Attributes:
        reads_ids: whether it has the policy's tokenizer and prompt format, so that it scores the sampled ids; else it
            reads text.
    """

    reads_ids: bool

    def as_reward(self, model: Scorer) -> Scorer | TextRewardModel:
        """The loaded model as the PPO trainer takes it."""
        if self.reads_ids:
            return model
        return TextRewardModel(model, load_tokenizer(self.folder), PromptFormat.from_dict(self.record.prompt_format))


@dataclass
class Rewards:
    """Everything that a recipe scores completions with."""

    models: list[RewardSource]  # the reward model, then the extra ones; none in a recipe of functions alone
    functions: dict[str, RewardFunction]  # by `module:function`
    value: Path | None  # folder that the value model starts from; None for the policy
    value_source: str | None  # `value_model_path`, if the recipe sets it

    def in_order(self, reward_model: Scorer | None, load: Callable[[Path], Scorer]) -> list[Reward]:
        """All rewards in the order of `reward_weights`: the loaded first reward model, the others, the functions."""
        loaded = [
            source.as_reward(load(source.folder) if number or reward_model is None else reward_model)
            for number, source in enumerate(self.models)
        ]
        return [*loaded, *self.functions.values()]

    def readers(self) -> list[tuple[str, Path]]:
        """Role and folder of every model that reads the policy's token ids."""
        rewards = [("reward model", item.folder) for item in self.models if item.reads_ids]
        return rewards if self.value is None else [*rewards, ("value model", self.value)]

    def lineage(self) -> dict[str, dict[str, Any]]:
        """The models read, for stage.json's `previous`."""
        names = ["reward" if number == 1 else f"reward_{number}" for number in range(1, len(self.models) + 1)]
        lineage = {name: item.reference for name, item in zip(names, self.models, strict=True)}
        if self.value is not None and self.value_source is not None:
            place = {"source": self.value_source, "revision": None, "path": source_place(self.value)}
            lineage["value_start"] = {**place, "fingerprint": model_fingerprint(self.value)}
        return lineage

    def fingerprints(self) -> dict[str, Any]:
        """Fingerprints of all models and functions, which determine the stage's result."""
        functions = {name: code_fingerprint(function) for name, function in self.functions.items()}
        models = {name: item["fingerprint"] for name, item in self.lineage().items()}
        return {**models, "reward_functions": functions} if functions else models

    def described(self, weights: list[float] | None) -> list[dict[str, Any]]:
        """The rewards in the order of `reward_weights`, for stage.json."""
        lines = [
            {"kind": "model", "name": name, "reads": "ids" if item.reads_ids else "text"}
            for name, item in zip(self.lineage(), self.models, strict=False)
        ]
        lines += [
            {"kind": "function", "name": name, "fingerprint": code_fingerprint(function)}
            for name, function in self.functions.items()
        ]
        return [{**line, "weight": weight} for line, weight in zip(lines, weights or [1.0] * len(lines), strict=True)]


def find_rewards(
    run: StageRun, sft: StageArtifact, prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase
) -> Rewards:
    """The reward models and functions of the PPO stage.

    Raises:
        InstructGPTError: if a model or function is missing, or no value model can be started.
    """
    data_args = run.settings.data_args
    models = find_reward_models(run, sft, prompt_format)
    if data_args.value_model_path is None:
        value = models[0].folder if models else None
        if models and not models[0].reads_ids:
            check_value_start(models[0], sft.base_model, prompt_format)
    else:
        value = resolve_source(data_args.value_model_path, role="value model")
        check_value_vocabulary(data_args.value_model_path, load_tokenizer(value), tokenizer)
    return Rewards(models, find_functions(data_args.reward_functions or []), value, data_args.value_model_path)


def find_reward_models(run: StageRun, sft: StageArtifact, prompt_format: PromptFormat) -> list[RewardSource]:
    """The reward model of the recipe, or of this run, and the extra ones; none where reward functions alone score.

    Raises:
        InstructGPTError: if one of them is not a finished reward stage.
    """
    data_args = run.settings.data_args
    own = run.settings.reward_stage or data_args.reward_model_path is not None
    names = [(data_args.reward_model_path, data_args.reward_model_revision)] if own else []
    names += [(source, None) for source in data_args.extra_reward_model_paths or []]
    sources = []
    for source, revision in names:
        stage = previous_stage(run, source, "reward", revision)
        same_words = stage.record.base_model["vocabulary"] == sft.base_model["vocabulary"]
        reads_ids = same_words and PromptFormat.from_dict(stage.record.prompt_format) == prompt_format
        sources.append(RewardSource(**vars(stage), reads_ids=reads_ids))
    return sources


def check_value_vocabulary(
    source: str, tokenizer: PreTrainedTokenizerBase, of_policy: PreTrainedTokenizerBase
) -> None:
    """Raise unless the value model that `value_model_path` names reads the policy's token ids.

    Raises:
        InstructGPTError: if its tokenizer is another one.
    """
    if vocabulary_fingerprint(tokenizer) != vocabulary_fingerprint(of_policy):
        raise InstructGPTError(
            f"value_model_path: {source}: has another tokenizer than the policy, whose token ids the value model "
            "reads. Name a reward or value model of the policy's tokenizer."
        )


def check_value_start(source: FinishedStage, base: dict[str, Any], prompt_format: PromptFormat) -> None:
    """Raise unless the value model can start from a reward model and read the policy's token ids.

    Args:
        source: the reward stage.
        base: record of the policy's base model.
        prompt_format: the policy's.

    Raises:
        InstructGPTError: if its tokenizer or prompt format differs.
    """
    advice = (
        " The value model would start from it and read the policy's token ids. To score the text of completions with "
        "it, set value_model_path to a model with the policy's tokenizer."
    )
    try:
        check_vocabulary(base, source.record.base_model, "the reward model")
        recorded = PromptFormat.from_dict(source.record.prompt_format)
        prompt_format.check_same(recorded, f"{source.folder}: reward model")
    except InstructGPTError as error:
        raise InstructGPTError(str(error) + advice) from None


def find_functions(names: list[str]) -> dict[str, RewardFunction]:
    """The functions that `module:function` name, from the environment or the current directory.

    Importing a module runs its code, which is the user's: nothing but what the recipe names is imported.

    Raises:
        InstructGPTError: naming every module or function that is missing, and why.
    """
    problems = Problems("reward_functions: these cannot be used:")
    functions: dict[str, RewardFunction] = {}
    for name in names:
        if name in functions:
            problems.add(f"{name!r}: duplicate; give it the sum of its weights")
        try:
            functions[name] = _find_function(name)
        except InstructGPTError as error:
            problems.add(f"{name!r}: {error}")
    problems.raise_if_any()
    return functions


_imported: dict[str, str] = {}  # module -> hash of its file


def _import(name: str) -> ModuleType:
    """Import a module, again if its file has changed since: in a notebook, functions are mended while Python runs."""
    importlib.invalidate_caches()
    module = importlib.import_module(name)
    file = getattr(module, "__file__", None)
    if file is not None and os.path.isfile(file):
        content = file_fingerprint(file)
        if _imported.setdefault(name, content) != content:
            module = importlib.reload(module)
        _imported[name] = content
    return module


def _find_function(name: str) -> RewardFunction:
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise InstructGPTError("must have the form module:function")
    here = os.getcwd()
    # Behind the environment, so that no file here takes the place of a library's.
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = _import(module_name)
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        if isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]:
            raise InstructGPTError(f"there is no module {module_name!r} in {here} or in the environment") from None
        raise InstructGPTError(
            f"module {module_name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    where = getattr(module, "__file__", None) or module_name
    function = getattr(module, function_name, None)
    if function is None:
        functions = [item for item in vars(module) if callable(getattr(module, item)) and not item.startswith("_")]
        raise InstructGPTError(f"{where} has no {function_name!r}; {nearest(function_name, functions)}".rstrip("; "))
    if not callable(function):
        raise InstructGPTError(f"{function_name!r} in {where} is a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]
