"""Whether the Hub can be reached, which is asked once; without it, the checks read the caches without waiting."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session

from instructgpt_hf._compat.quirks import connection_error, offline_mode
from instructgpt_hf.errors import first_line
from instructgpt_hf.hub.sources import is_repo_id
from instructgpt_hf.stages.checks.report import Report
from instructgpt_hf.stages.run import StageRun

TIMEOUT = 10  # seconds
SOURCES = (
    *("dataset_name", "pretraining_dataset_name", "sft_model_path"),
    *("reward_model_path", "value_model_path", "extra_reward_model_paths"),
)


@contextlib.contextmanager
def hub_or_cache(runs: Sequence[StageRun], report: Report) -> Iterator[None]:
    """Context in which what the stages name on the Hub is read: from the caches alone if the Hub cannot be reached.

    Then a problem of the report, or a line in the log where there is none, says so.
    """
    reason = _unreachable() if not constants.HF_HUB_OFFLINE and _named_on_hub(runs) else None
    with offline_mode() if reason else contextlib.nullcontext():
        yield
    if reason is None:
        return
    text = f"{constants.ENDPOINT} cannot be reached ({reason})"
    if report.problems.items:
        report.problems.items.insert(
            0,
            f"{text}, so only what is in the cache ({constants.HF_HOME}) can be read. Check the connection, give "
            "local files and folders, or set HF_HOME to the folder of a cache that has all of it.",
        )
    else:
        runs[0].log(f"{text}; all that is needed is in the cache, and HF_HUB_OFFLINE=1 reads it without waiting")


def _named_on_hub(runs: Sequence[StageRun]) -> bool:
    """Whether a setting names something that is not on this machine."""
    for run in runs:
        given: list[Any] = [run.settings.model_args.model_name_or_path]
        for name in SOURCES:
            value = getattr(run.settings.data_args, name, None)
            given += value if isinstance(value, list) else [value]
        if any(is_repo_id(source) and not Path(source).expanduser().exists() for source in given):
            return True
    return False


def _unreachable() -> str | None:
    """Why the Hub gives no answer at all, or None if it does."""
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except (connection_error(), OSError) as error:  # type: ignore[misc]
        return first_line(error)
    return None
