"""The folder of a run: one run at a time, what killed ones leave behind, a full disk."""

import errno
import functools
import json
import os
import re
import signal
import threading
from pathlib import Path

import pytest
import torch
from helpers.ppo_runs import screen
from safetensors import SafetensorError

from instructgpt_hf._compat.hub_errors import reading
from instructgpt_hf.artifacts import atomic_folder
from instructgpt_hf.errors import InstructGPTError, full_disk, loading_errors, read_only_cache
from instructgpt_hf.stages import folder as module
from instructgpt_hf.stages.folder import hold


def in_another_process(work):
    """Start `work` in a forked process; returns its id once `work` has been entered, and it stays there."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with work():
                os.write(write, b"1")
                signal.pause()
        finally:
            os._exit(0)
    assert os.read(read, 1) == b"1"
    return child


def end(child, by=signal.SIGKILL):
    os.kill(child, by)
    os.waitpid(child, 0)


class TestLock:
    def test_a_second_run_is_refused_and_told_who_holds_the_folder(self, tmp_path):
        child = in_another_process(lambda: hold(tmp_path / "run", screen()))
        try:
            for _ in range(2):  # being refused takes nothing from the holder
                with (
                    pytest.raises(InstructGPTError, match=rf"another run writes here \(process {child} on \S+, since"),
                    hold(tmp_path / "run", screen()),
                ):
                    pass
        finally:
            end(child)

    def test_a_killed_run_holds_nothing(self, tmp_path):
        end(in_another_process(lambda: hold(tmp_path / "run", screen())))
        assert (tmp_path / "run" / ".lock").exists()
        with hold(tmp_path / "run", screen()):
            assert json.loads((tmp_path / "run" / ".running.json").read_text())["process"] == os.getpid()

    def test_a_worker_that_outlives_its_killed_run_holds_nothing(self, tmp_path):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            with hold(tmp_path, screen()):
                if (worker := os.fork()) == 0:
                    signal.pause()
                os.write(write, str(worker).encode())
                signal.pause()
        worker = int(os.read(read, 20))
        try:
            end(child)
            with hold(tmp_path, screen()):
                pass
        finally:
            os.kill(worker, signal.SIGKILL)

    def test_nothing_stays_behind(self, tmp_path):
        with hold(tmp_path / "runs" / "new", screen()):
            assert (tmp_path / "runs" / "new" / ".lock").exists()
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(ZeroDivisionError), hold(tmp_path / "run", screen()):
            (tmp_path / "run" / "file").write_text("kept")
            1 / 0  # noqa: B018
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]

    def test_one_thread_may_hold_it_twice_another_may_not(self, tmp_path):
        refused = []

        def second():
            try:
                with hold(tmp_path, screen()):
                    pass
            except InstructGPTError as error:
                refused.append(str(error))

        with hold(tmp_path, screen()), hold(tmp_path, screen()):
            other = threading.Thread(target=second)
            other.start()
            other.join()
        assert len(refused) == 1 and "another thread of this process" in refused[0]
        second()
        assert len(refused) == 1

    def test_only_the_main_process_of_several_holds_it(self, tmp_path, monkeypatch):
        with hold(tmp_path, screen()):
            monkeypatch.setenv("RANK", "1")
            child = in_another_process(lambda: hold(tmp_path, screen()))
            end(child)

    def test_where_it_cannot_be_written_later_checks_speak(self, tmp_path):
        (tmp_path / "file").write_text("")
        with hold(tmp_path / "file", screen()):
            pass
        assert (tmp_path / "file").is_file()

    def test_a_file_system_without_locks_is_said(self, tmp_path, monkeypatch):
        def no_locks(descriptor):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(module, "_lock_descriptor", no_locks)
        console = screen()
        with hold(tmp_path, console):
            pass
        assert "has no locks" in console.export_text()


class TestLeftovers:
    def test_the_next_run_removes_what_a_killed_one_was_writing(self, tmp_path):
        for name in ("evaluation", "ppo-ptx", "data-seed3"):
            end(in_another_process(lambda name=name: atomic_folder(tmp_path / name)))
        assert len(list(tmp_path.iterdir())) == 3
        (tmp_path / ".cache").mkdir()
        with hold(tmp_path, screen()):
            pass
        assert [path.name for path in tmp_path.iterdir()] == [".cache"]

    def test_a_folder_that_was_about_to_be_replaced_comes_back(self, tmp_path):
        (tmp_path / ".sft.old.abc" / "sft").mkdir(parents=True)
        (tmp_path / ".sft.abc").mkdir()
        (tmp_path / "ppo").mkdir()
        (tmp_path / ".ppo.old.abc" / "ppo" / "old").mkdir(parents=True)
        with hold(tmp_path, screen()):
            pass
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["ppo", "sft"]


def raised(error, cause=None):
    try:
        raise error from cause
    except type(error) as caught:
        return caught


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FULL_ERRORS = {
    "system": FULL,
    "quota": OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "torch": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    "torch, writing": RuntimeError(
        "[enforce fail at inline_container.cc:1] . PytorchStreamWriter failed writing file"
    ),
    "torch, old format": RuntimeError("write(): fd 3 failed with No space left on device"),
    "arrow": OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),
    "from another": raised(ValueError("cannot save"), FULL),
}


class TestFullDisk:
    @pytest.mark.parametrize("error", FULL_ERRORS.values(), ids=FULL_ERRORS)
    def test_it_is_named_whatever_the_library_made_of_it(self, error, tmp_path):
        with (
            pytest.raises(InstructGPTError, match=r"the disk is full .* MiB are free\).*same command again") as caught,
            hold(tmp_path / "run", screen()),
        ):
            raise error
        assert str(tmp_path / "run") in str(caught.value)

    def test_the_file_is_named_where_it_is_known(self):
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/no/such/file")
        assert full_disk(error, "/tmp/run").startswith("/tmp/no/such/file: the disk is full")

    @pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no device that is always full")
    def test_a_real_one(self, tmp_path):
        for weights in (b"x" * 100_000, None):
            named = pytest.raises(InstructGPTError, match="the disk is full")
            with named, hold(tmp_path, screen()), open("/dev/full", "wb") as file:
                file.write(weights) if weights else torch.save({"weights": torch.zeros(100_000)}, file)

    def test_a_broken_file_is_another_error(self, tmp_path):
        (tmp_path / "model.pt").write_bytes(b"PK\x03\x04 nothing")
        with pytest.raises(RuntimeError, match="PytorchStreamReader") as caught:
            torch.load(tmp_path / "model.pt")
        assert full_disk(caught.value, tmp_path) is None
        assert full_disk(PermissionError(errno.EACCES, "no"), tmp_path) is None


class TestReadOnlyCache:
    @pytest.fixture
    def cache(self, tmp_path, monkeypatch):
        """A cache that nobody can write, not even root: a file stands where its folder would be."""
        (tmp_path / "file").touch()
        monkeypatch.setenv("HF_HOME", str(tmp_path / "file" / "hf"))
        return tmp_path / "file" / "hf"

    @pytest.mark.parametrize("named", [loading_errors, functools.partial(reading, repo_id="x")])
    def test_loading_says_which_variable_to_set(self, cache, named):
        with pytest.raises(InstructGPTError) as caught, named("model 'x'"):
            (cache / "hub" / "models--x").mkdir(parents=True)
        assert re.search(r"model 'x': .*cannot be written \(Not a directory\)\. Set HF_HOME", str(caught.value))

    def test_anywhere_in_a_run(self, cache, tmp_path):
        error = ValueError("of a library")
        error.__cause__ = OSError(errno.EROFS, os.strerror(errno.EROFS), str(cache / "datasets" / "x.arrow"))
        with (
            pytest.raises(InstructGPTError, match=r"Read-only file system.*HF_DATASETS_CACHE.*same command again"),
            hold(tmp_path / "run", screen()),
        ):
            raise error

    def test_other_files_are_other_errors(self, cache, tmp_path):
        for place in (tmp_path / "data.jsonl", cache.with_name("hf-other") / "x", None):
            assert read_only_cache(PermissionError(errno.EACCES, "no", place and str(place))) is None
        assert read_only_cache(FileNotFoundError(errno.ENOENT, "no", str(cache / "x"))) is None
