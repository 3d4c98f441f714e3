"""Models and datasets that the Hub does not hand out: the message says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
from helpers.hub_client import Client
from helpers.local_hub import LocalHub, Repo, StoredFile
from huggingface_hub import errors

from instructgpt_hf._compat.quirks import dataset_refusal
from instructgpt_hf.data.sources import load_split
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.models.origins import resolve_source

READ = """
    import json, sys
    from instructgpt_hf.errors import InstructGPTError
    from instructgpt_hf.models.origins import resolve_source
    def read(source, revision):
        try:
            return str(resolve_source(source, revision, "sft_model_path"))
        except InstructGPTError as error:
            return str(error)
    print(json.dumps([read(*item) for item in json.loads(sys.argv[1])]))
"""
PAGE = "https://huggingface.co/"


@pytest.fixture
def repos(hub: LocalHub) -> LocalHub:
    """An open repository, a gated and a private one of somebody else."""
    for name, private, gated in (("open", False, False), ("gated", False, True), ("private", True, False)):
        repo = hub.repos[f"carol/{name}"] = Repo(f"carol/{name}", private, gated=gated)
        repo.add("first", {"config.json": StoredFile(b"{}", False)})
    return hub


def test_models(repos: LocalHub, client: Client) -> None:
    first = repos.repos["carol/open"].commits[0].sha
    repos.repos["carol/open"].add("second", {"config.json": StoredFile(b'{"second": 1}', False)})
    wanted = [["carol/open", first], ["carol/open", "v9"], ["carol/gated", None], ["carol/private", None]]
    wanted += [["carol/opne", None], ["runs/mine/sft", None]]
    found = {}
    for token in ("hf_aliceSecretToken1234567890", None):
        old, revision, gated, private, missing, path = client.value(READ, json.dumps(wanted), token=token)
        assert json.loads((Path(old) / "config.json").read_text()) == {}
        assert "'carol/open' (revision 'v9')" in revision and "no such revision" in revision
        assert f"gated. Accept its conditions at {PAGE}carol/gated" in gated and "`hf auth login`" in gated
        for message in (private, missing):
            assert "Check the spelling" in message and "if it is private, log in with `hf auth login`" in message
        assert f"{PAGE}carol/opne" in missing
        assert "neither a local folder nor a model on the Hub" in path
        found[token] = [revision, gated, private, missing]
    assert all("Client Error" not in message for messages in found.values() for message in messages)
    fresh = Client(repos.url, client.folder / "fresh")
    fresh.folder.mkdir()
    (refused,) = fresh.value(READ, json.dumps(wanted[:1]), token="hf_notAToken1234567890")
    assert "does not accept the token (401). Log in with `hf auth login`" in refused


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        ("GatedRepoError", 401, f"gated. Accept its conditions at {PAGE}datasets/org/data"),
        ("GatedRepoError", 403, f"gated. Accept its conditions at {PAGE}datasets/org/data"),
        ("RepositoryNotFoundError", 404, f"Check the spelling ({PAGE}datasets/org/data, or the local path)"),
        ("HfHubHTTPError", 403, "the token may not read it (403)"),
    ],
)
def test_datasets(monkeypatch: pytest.MonkeyPatch, error: str, status: int, expected: str) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        response = SimpleNamespace(status_code=status, headers={}, request=None)
        raise getattr(errors, error)(f"{status} Client Error.", response=response)

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "hf_hub_download", refuse)
    with pytest.raises(InstructGPTError) as raised:
        load_split("org/data", "train", role="prompts")
    assert expected in str(raised.value) and str(raised.value).startswith("prompts: 'org/data'")


def test_a_dataset_that_could_not_be_read_for_another_reason() -> None:
    assert dataset_refusal(ValueError("Unknown split 'tset'")) is None


def test_without_a_network() -> None:
    """The tests run in offline mode."""
    with pytest.raises(InstructGPTError, match=r"cannot be reached, or offline mode is on(.*)HF_HUB_OFFLINE"):
        resolve_source("org/not-in-the-cache")


def test_a_local_folder_has_no_revision(tmp_path: Path) -> None:
    assert resolve_source(str(tmp_path), "main") == tmp_path
    with pytest.raises(InstructGPTError, match="local folder, which has no revision 'v1'"):
        resolve_source(str(tmp_path), "v1", "sft stage")
