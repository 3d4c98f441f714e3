"""Every quirk is described and tested; messages, errors and data of the libraries that are worked around.

A failure of a behaviour means that upstream has changed it: see under "Goes when" whether the workaround can go.
"""

from __future__ import annotations

import inspect
import io
import logging
import sys
import types
import warnings
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from datasets import Dataset, load_dataset
from helpers.upstream import OLD_CHECKPOINTING, caught
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers.integrations import WandbCallback
from trl.models.utils import disable_gradient_checkpointing

from instructgpt_hf._compat import mixins, peft, quirks, trainers
from instructgpt_hf._compat.checkpoints import WholeCheckpoints

PARTS = ("Cause:", "Goes when:", "Relies on:")


def described():
    """Every function and class that works around something, by its docstring."""
    modules = {module: vars(module) for module in (quirks, peft)}
    classes = [WholeCheckpoints, mixins.CommonChanges, mixins.SeveralBackwards]
    own = [
        item
        for module, names in modules.items()
        for item in names.values()
        if inspect.isfunction(item) and inspect.unwrap(item).__module__ == module.__name__
    ]
    return [*classes, trainers.RankingTrainer, trainers.OnPolicyTrainer, *own]


def test_every_quirk_states_its_cause_and_its_end():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    plain = {"adapter_layers", "applied_adapters", "unwrap_peft"}
    for item in described():
        if item.__name__ not in plain:
            missing = [part for part in PARTS if part not in inspect.getdoc(item)]
            assert not missing, f"{item.__name__}: {missing}"
            assert item.__name__ in tests, f"{item.__name__} has no test of the behaviour"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("set_vllm_weights", "vLLM needs a GPU; tests/trainers/test_ppo_generation.py checks what would be sent"),
        ("CommonChanges.end", "a deadlock of several processes; tests/trainers/test_ppo_processes.py ends such runs"),
    ],
)
def test_behaviour_that_is_out_of_reach_here(name, reason):
    pytest.skip(reason)


class TestMessages:
    @OLD_CHECKPOINTING
    def test_trl_uses_a_deprecated_name(self, make_policy):
        """`quiet_environment`."""

        def enter():
            with disable_gradient_checkpointing(make_policy()):
                pass

        assert any("is_gradient_checkpointing" in text for text in caught(enter))

        def quiet():
            with quirks.quiet_environment():
                warnings.filterwarnings("always", message="another")
                enter()

        assert not any("is_gradient_checkpointing" in text for text in caught(quiet))

    def test_bitsandbytes_hints_at_a_kernel(self):
        """`silence_kernel_hint`."""
        from bitsandbytes.backends.cpu import ops

        assert "Failed to load CPU gemm_4bit" in inspect.getsource(ops)
        record = logging.LogRecord(
            ops.logger.name, logging.WARNING, "", 0, "Failed to load CPU gemm_4bit: x", (), None
        )
        quirks.silence_kernel_hint()
        assert not logging.getLogger(ops.logger.name).filter(record)

    def test_the_bars_of_the_libraries_are_tqdms(self):
        """`no_library_bars`: each library has a class of its own and a switch of its own."""
        from datasets.utils import enable_progress_bars
        from datasets.utils import tqdm as of_datasets
        from huggingface_hub.utils import tqdm as of_hub
        from transformers.utils.logging import tqdm as of_transformers

        enable_progress_bars()
        with quirks.no_library_bars():
            assert all(make(range(3), disable=False).disable for make in (of_datasets, of_hub, of_transformers))
        assert not of_datasets(range(3), disable=False, file=io.StringIO()).disable

    def test_a_failed_connection_raises_the_http_librarys_error(self, monkeypatch):
        """`connection_error`."""
        from huggingface_hub import constants, get_session

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        with pytest.raises(quirks.connection_error()) as failure:
            get_session().get("http://127.0.0.1:9")
        assert not type(failure.value).__module__.startswith("huggingface_hub")


class TestDatasets:
    def test_fingerprint_depends_on_the_content(self):
        """`dataset_fingerprint`."""
        first, second = Dataset.from_dict({"text": ["a"]}), Dataset.from_dict({"text": ["b"]})
        assert quirks.dataset_fingerprint(first) != quirks.dataset_fingerprint(second)

    def test_the_shuffle_buffer_of_a_stream_does_not_resume_exactly(self):
        """Why `instructgpt_hf.data.documents` shuffles windows of its own."""

        def stream():
            return Dataset.from_dict({"n": range(3000)}).to_iterable_dataset().shuffle(seed=0, buffer_size=100)

        first, second = stream(), stream()
        rows = iter(first)
        for _ in range(1500):
            next(rows)
        second.load_state_dict(first.state_dict())
        assert [row["n"] for row in rows] != [row["n"] for row in second]


class TestTrackers:
    def test_the_trainer_leaves_its_wandb_run_open(self):
        """`own_tracker_run`: only a hyperparameter search ends the runs."""
        at_the_end = inspect.getsource(WandbCallback.on_train_end)
        assert "finish" not in at_the_end

    def test_a_wandb_run_ends_with_the_block_it_began_in(self, monkeypatch):
        wandb = types.SimpleNamespace(run=None, ended=0)
        wandb.finish = lambda: wandb.__dict__.update(run=None, ended=wandb.ended + 1)
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        with pytest.raises(ZeroDivisionError), quirks.own_tracker_run():
            wandb.run = object()
            1 / 0  # noqa: B018
        assert wandb.ended == 1
        wandb.run = object()  # the user's, around all stages
        with quirks.own_tracker_run():
            pass
        assert wandb.ended == 1 and wandb.run is not None


def test_offline_mode_is_read_at_every_call(monkeypatch):
    """`offline_mode`: both libraries then raise without a request, and otherwise wait through retries."""
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    waits = []
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", waits.append)
    with quirks.offline_mode():
        with pytest.raises(LocalEntryNotFoundError):
            huggingface_hub.snapshot_download("nobody/nothing")
        with pytest.raises(ConnectionError, match="OfflineModeIsEnabled"):
            load_dataset("nobody/nothing")
        assert huggingface_hub.is_offline_mode()
    assert waits == [] and not huggingface_hub.is_offline_mode()
    with pytest.raises(ConnectionError):
        load_dataset("nobody/nothing")
    assert sum(waits) > 10


@pytest.mark.parametrize(("kind", "status"), [("gated", 401), ("gated", 403), ("missing", 404)])
def test_datasets_drops_the_error_of_the_hub(monkeypatch, kind, status):
    """`dataset_refusal`."""
    errors = {"gated": "GatedRepoError", "missing": "RepositoryNotFoundError"}

    def refuse(*args, **kwargs):
        response = types.SimpleNamespace(status_code=status, headers={}, request=None)
        raise getattr(huggingface_hub.errors, errors[kind])("refused", response=response)

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "hf_hub_download", refuse)
    with pytest.raises(Exception) as raised:
        load_dataset("org/data")
    assert raised.value.__cause__ is None and not hasattr(raised.value, "response")
    assert quirks.dataset_refusal(raised.value) == kind
    assert quirks.dataset_refusal(ValueError("doesn't exist on the Hub")) is None
