"""Text for every terminal: ASCII forms of symbols where the terminal has no others. Standard library only."""

from __future__ import annotations

import codecs
import io
import os
import sys

_ERRORS = "instructgpt_hf.ascii"
_ASCII = {
    **{"–": "-", "—": "-", "−": "-", "…": "...", "·": "*", "×": "x", "±": "+-", "≤": "<=", "≥": ">=", "≈": "~"},
    **{"§": "section ", "→": "->", "‘": "'", "’": "'", "“": '"', "”": '"', "•": "*", "\u00a0": " ", "√": "sqrt "},
    **dict.fromkeys("─━╸╺╴╶═", "-"),
    **dict.fromkeys("│┃║", "|"),
    **dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╰╯", "+"),
}


def settle_encoding() -> None:
    """Let standard output and standard error print any text, as far as possible in symbols of their encoding.

    Where the user's locale is plain C, they print ASCII only. Python writes UTF-8 there, which a terminal of that
    locale shows as other characters.
    """
    codecs.register_error(_ERRORS, _replaced)
    encoding = "ascii" if _is_plain() else None
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=encoding, errors=_ERRORS)


def _is_plain() -> bool:
    """Whether the locale is C and nobody has told Python another encoding."""
    if os.environ.get("PYTHONIOENCODING") or os.environ.get("PYTHONUTF8") or sys.platform == "win32":
        return False
    # Not LC_CTYPE unless it is plain too: Python itself sets it to C.UTF-8 where the locale is C.
    named = os.environ.get("LC_ALL") or os.environ.get("LANG")
    ours = os.environ.get("LC_ALL") or os.environ.get("LC_CTYPE") in (None, "", "C", "POSIX", "C.UTF-8")
    return named in ("C", "POSIX") and bool(ours)


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """ASCII forms of what an encoding lacks: those of symbols, and escapes of everything else."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    shown = (_ASCII.get(item, item.encode("ascii", "backslashreplace").decode()) for item in text)
    return "".join(shown), error.end
