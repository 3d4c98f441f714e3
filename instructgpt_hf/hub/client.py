"""Hub calls with retries, and errors that say what to do.

huggingface_hub retries uploads, but not creating a repository, validating a card or committing: without retries here,
a 503 or a dropped connection would end the push. Retries are safe: files already uploaded are recognised by hash.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from instructgpt_hf._compat.hub_errors import is_network_error, status_of
from instructgpt_hf.errors import InstructGPTError

T = TypeVar("T")

_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_DELAYS = (1.0, 2.0, 4.0, 8.0)  # seconds before each repetition
_LONGEST_DELAY = 60.0
_LOGIN = "Log in with `hf auth login` using a token with write access, or set HF_TOKEN."


def call(action: str, function: Callable[[], T], *, secret: str | None = None) -> T:
    """Call `function`, again after transient failures (408, 425, 429, 5xx, connection errors).

    Args:
        action: for the error message: `"create the repository user/name"`.
        function: safe to call more than once.
        secret: a token to remove from the error message.

    Raises:
        InstructGPTError: if the failure is not transient or the last retry fails, with cause and remedy.
    """
    for delay in (*_DELAYS, None):
        try:
            return function()
        except Exception as error:
            if delay is None or not _is_transient(error):
                problem = _explained(action, error)
                if problem is None:
                    raise
                # Not chained: huggingface_hub's error holds the request, which holds the token.
                raise InstructGPTError(problem.replace(secret, "***") if secret else problem) from None
            time.sleep(min(_retry_after(error) or delay, _LONGEST_DELAY))
    raise AssertionError("unreachable")


def _is_transient(error: BaseException) -> bool:
    return status_of(error) in _TRANSIENT or is_network_error(error)


def _retry_after(error: BaseException) -> float | None:
    headers: Any = getattr(getattr(error, "response", None), "headers", None) or {}
    try:
        return float(headers.get("Retry-After"))
    except (TypeError, ValueError):
        return None


def _explained(action: str, error: BaseException) -> str | None:
    """The message for the user about a failure; None for a bug, which keeps its traceback."""
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    start, status = f"Could not {action}: ", status_of(error)
    if isinstance(error, OfflineModeIsEnabled):
        return f"{start}offline mode is on. Unset HF_HUB_OFFLINE to push."
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return f"{start}the Hub asks for a valid token (401). {_LOGIN}"
    if status == 403:
        return (
            f"{start}the token may not write there (403). Check that the namespace is your user name or an "
            "organization you may write to (`hf auth whoami`), and that the token has write access. "
            "Choose another namespace with --hub_namespace, or log in again with `hf auth login`."
        )
    if status == 404:
        return (
            f"{start}the Hub does not know it, or hides it from this token (404). Check the spelling of the "
            "namespace, and with `hf auth whoami` who you are logged in as."
        )
    if isinstance(error, HFValidationError):
        return f"{start}{error}"
    if isinstance(error, ValueError) and "errors" in str(error):
        return f"{start}the Hub refuses the card's metadata. {error}"
    if status is not None:
        detail = getattr(error, "server_message", None) or f"HTTP status {status}"
        hint = " Try again later; what was uploaded is kept." if status in _TRANSIENT else ""
        return f"{start}{detail}.{hint}"
    if is_network_error(error) or isinstance(error, RuntimeError):
        return f"{start}{error}. Check the connection and push again; what was uploaded is kept."
    return None
