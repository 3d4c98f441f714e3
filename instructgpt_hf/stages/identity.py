"""What determines a stage's result: as a fingerprint, and as words for what has changed since it was last trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from instructgpt_hf import __version__
from instructgpt_hf.artifacts import StageArtifact, to_json
from instructgpt_hf.config.device import world_size
from instructgpt_hf.config.settings import adjustable_keys, neutral_keys, stage_settings
from instructgpt_hf.stages.run import StageRun

Changes = dict[str, list[Any]]
_CODE = "reward_functions."
_SHOWN = 60  # characters of a value


def stage_identity(run: StageRun, data: dict[str, dict[str, Any]], models: dict[str, Any]) -> dict[str, Any]:
    """All that determines a stage's result, as plain JSON; equal ones have the same `artifacts.fingerprint`.

    Args:
        data: records of the datasets read, by role.
        models: fingerprints of the models and functions read, by role.
    """
    neutral = neutral_keys(run.settings.stage)
    values = {key: value for key, value in run.settings.changed().items() if key not in neutral}
    if world_size() > 1:  # the effective batch size scales with it
        values["processes"] = world_size()
    contents = {role: record["fingerprint"] for role, record in data.items()}
    identity: dict[str, Any] = to_json(
        {"stage": run.name, "values": values, "data": contents, "version": __version__, **models}
    )
    return identity


def finished_identity(run: StageRun, artifact: StageArtifact) -> dict[str, Any]:
    """What a finished stage's record says of its identity; models and functions are left out."""
    neutral = neutral_keys(run.settings.stage)
    values = {key: value for key, value in artifact.config.items() if key not in neutral}
    if artifact.hardware.get("processes", 1) > 1:
        values["processes"] = artifact.hardware["processes"]
    contents = {role: record["fingerprint"] for role, record in artifact.data.items()}
    return {"stage": run.name, "values": values, "data": contents, "version": artifact.versions.get("instructgpt_hf")}


def differences(run: StageRun, old: Mapping[str, Any], new: Mapping[str, Any]) -> Changes:
    """[old, new] of all that differs: settings by their key, everything else as `data.prompts`, `sft`, `version`."""
    before, after = _flat(run, old), _flat(run, new)
    names = sorted(before.keys() | after.keys())
    return {name: [before.get(name), after.get(name)] for name in names if before.get(name) != after.get(name)}


def _flat(run: StageRun, identity: Mapping[str, Any]) -> dict[str, Any]:
    known = {key: to_json(item.default) for key, item in stage_settings(run.settings.stage).items()}
    flat: dict[str, Any] = {"processes": 1} | known | identity.get("values", {})
    for name, value in identity.items():
        if isinstance(value, dict) and name != "values":
            flat |= {f"{name}.{part}": item for part, item in value.items()}
        elif name != "values":
            flat[name] = value
    return flat


def may_go_on(run: StageRun, changes: Changes) -> bool:
    """Whether a stage may go on from its checkpoints with these changes: adjustable settings, code of functions."""
    adjustable = adjustable_keys(run.settings.stage)
    return all(name in adjustable or (name.startswith(_CODE) and None not in both) for name, both in changes.items())


def describe(run: StageRun, changes: Changes) -> str:
    """The changes in words, for the user."""
    return "; ".join(_described(run, name, *both) for name, both in changes.items())


def _described(run: StageRun, name: str, old: Any, new: Any) -> str:
    if name in stage_settings(run.settings.stage) or name in ("processes", "version"):
        shown = "instructgpt_hf" if name == "version" else name
        return f"{shown} {_short(old)} -> {_short(new)}"
    kind, _, part = name.partition(".")
    what = {"data": f"the {part}", "reward_functions": f"the code of {part}", "stage": "the stage"}
    return f"{what.get(kind, f'the {kind} model')} ({_short(old)} -> {_short(new)})"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
