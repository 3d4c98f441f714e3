"""The command `instructgpt-hf`."""

from __future__ import annotations

from instructgpt_hf.cli.command import build_parser, main

__all__ = ["build_parser", "main"]
