"""`instructgpt-hf lab`: write the generated data of the lab."""

from __future__ import annotations

import argparse
from pathlib import Path

from instructgpt_hf.cli.command import Verbs
from instructgpt_hf.errors import InstructGPTError


def add(verbs: Verbs) -> None:
    """Add the verb."""
    parser = verbs.add("lab", "write the generated data of the lab", "instructgpt-hf lab data --seed 0", _write)
    parser.add_argument("folder", metavar="DIR", help="where the files go")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default 0)")


def _write(arguments: argparse.Namespace) -> None:
    from instructgpt_hf import lab

    folder = Path(arguments.folder)
    if folder.exists() and not folder.is_dir():
        raise InstructGPTError(f"{folder}: is a file; give a folder")
    try:
        paths = lab.write(folder, arguments.seed)
    except OSError as error:
        raise InstructGPTError(f"{folder}: cannot be written ({error.strerror})") from None
    print(f"Wrote {len(paths)} files to {folder}")
