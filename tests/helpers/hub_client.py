"""Runs the Hub's client in a process of its own: it reads the HF_* variables when it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

TOKEN = "hf_aliceSecretToken1234567890"
READ_TOKEN = "hf_aliceReadOnlyToken123456"


class Client:
    """Python code against the Hub at `url`, with `folder` as working folder and an empty cache in it."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder

    def run(self, code: str, *arguments: Any, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment |= {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HOME": str(self.folder / "hf-home"),
            "OMP_NUM_THREADS": "1",
        }
        if token:
            environment["HF_TOKEN"] = token
        words = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
        return subprocess.run(words, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=300)

    def value(self, code: str, *arguments: Any, token: str | None = TOKEN) -> Any:
        """What the code printed last, read as JSON."""
        process = self.run(code, *arguments, token=token)
        assert process.returncode == 0, process.stdout + process.stderr
        return json.loads(process.stdout.strip().splitlines()[-1])
