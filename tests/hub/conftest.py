"""A local Hub, a client in its own process, and a tiny run to push."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hub_client import READ_TOKEN, TOKEN, Client
from helpers.local_hub import LocalHub
from helpers.tiny_run import write_run


@pytest.fixture(scope="session")
def server() -> Iterator[LocalHub]:
    hub = LocalHub({TOKEN: "alice", READ_TOKEN: "alice"}, read_only=(READ_TOKEN,))
    yield hub
    hub.stop()


@pytest.fixture
def hub(server: LocalHub) -> LocalHub:
    server.reset()
    return server


@pytest.fixture
def client(hub: LocalHub, tmp_path: Path) -> Client:
    return Client(hub.url, tmp_path)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("home") / "bob" / "runs" / "tiny")


@pytest.fixture
def run_copy(tiny_run: Path, tmp_path: Path) -> Path:
    """The tiny run's SFT stage, to be changed by a test."""
    import shutil

    shutil.copytree(tiny_run / "sft", tmp_path / "run" / "sft")
    return tmp_path / "run"
