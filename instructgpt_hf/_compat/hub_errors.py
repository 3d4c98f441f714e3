"""What the Hub's refusals mean for those who read from it: cause and remedy in place of the client's first line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from instructgpt_hf._compat.quirks import connection_error, dataset_refusal
from instructgpt_hf.errors import InstructGPTError, first_line, read_only_cache


def status_of(error: BaseException) -> int | None:
    """HTTP status of a failed request; None where there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_network_error(error: BaseException) -> bool:
    """Whether the Hub could not be reached at all, other than on purpose."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    failed = isinstance(error, (connection_error(), ConnectionError, TimeoutError))
    return failed and status_of(error) is None and not isinstance(error, OfflineModeIsEnabled)


@contextlib.contextmanager
def reading(message: str, repo_id: str, *kinds: type[Exception], dataset: bool = False) -> Iterator[None]:
    """Raise a library's errors inside the block, which reads `repo_id`, with what to do where the Hub refuses it.

    As `errors.loading_errors`, for what may be on the Hub; `dataset` says that it is no model.
    """
    kinds = kinds or (OSError, ValueError)
    try:
        yield
    except kinds as error:
        raise InstructGPTError(f"{message}: {_reading_explained(error, repo_id, dataset)}") from error


def _reading_explained(error: Exception, repo_id: str, dataset: bool) -> str:
    """What the user can do about a failure to read a repository; the first line of the error for any other one."""
    page = f"https://huggingface.co/{'datasets/' if dataset else ''}{repo_id}"
    refusal, status = _refusal(error), status_of(error)
    if refusal == "gated":
        return (
            f"it is gated. Accept its conditions at {page} (some authors confirm each user by hand), then log in as "
            "that user with `hf auth login`, or set HF_TOKEN."
        )
    if refusal == "revision":
        return f"it has no such revision. {page}/tree/main lists its branches, tags and commits."
    if refusal == "missing":
        return (
            f"the Hub does not know it, or hides it from you. Check the spelling ({page}, or the local path); if it "
            "is private, log in with `hf auth login` as a user who may read it (`hf auth whoami` says who you are)."
        )
    if status == 401:
        return "the Hub does not accept the token (401). Log in with `hf auth login`, or mend or unset HF_TOKEN."
    if status == 403:
        return (
            f"the token may not read it (403). Choose a token that may at https://huggingface.co/settings/tokens and "
            f"log in with it (`hf auth login`); see also {page}."
        )
    if refusal == "unreachable":
        return (
            "the Hub cannot be reached, or offline mode is on, and the cache does not hold all of it. Check the "
            "connection and HF_HUB_OFFLINE, or give a local folder."
        )
    return read_only_cache(error) or first_line(error)


def _refusal(error: Exception) -> str | None:
    """The kind of a failure to read: "gated", "revision", "missing", "unreachable", or None for any other."""
    from huggingface_hub import errors

    # A gated repository counts as not found too, for those who may not read it.
    kinds: dict[str, tuple[type[BaseException], ...]] = {
        "gated": (errors.GatedRepoError,),
        "revision": (errors.RevisionNotFoundError,),
        "missing": (errors.RepositoryNotFoundError,),
        "unreachable": (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled),
    }
    for kind, types in kinds.items():
        if isinstance(error, types):
            return kind
    return dataset_refusal(error) or ("unreachable" if is_network_error(error) else None)
