"""A stage that is stopped from outside: by Ctrl-C or SIGTERM, alone or as one of several processes."""

import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from helpers.ppo_runs import ppo_runs, screen
from safetensors import SafetensorError
from transformers import TrainerControl, TrainerState

from instructgpt_hf import cli
from instructgpt_hf.artifacts import file_fingerprint
from instructgpt_hf.cli import interruption
from instructgpt_hf.errors import InstructGPTError, Interrupted
from instructgpt_hf.stages.fit import StopAtCheckpoint
from instructgpt_hf.stages.folder import hold
from instructgpt_hf.trainers.ppo import state

LAUNCHER = """
import os, subprocess, sys
children = [
    subprocess.Popen([sys.executable, "-c", CHILD, *sys.argv[3:]], env={**os.environ, "LOCAL_RANK": str(rank)})
    for rank in range(2)
]
sys.exit(max(child.wait() for child in children))
"""


class Messages:
    """Stands for a run's log."""

    def __init__(self):
        self.lines = []

    def log(self, text):
        self.lines.append(text)


@pytest.fixture(scope="module")
def ppo(tokenizer, tmp_path_factory):
    return ppo_runs(tmp_path_factory.mktemp("stop"), tokenizer, learning_rate=1e-2, save_total_limit=None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_the_stage_saves_a_checkpoint_and_the_same_command_goes_on(ppo, monkeypatch, number):
    whole = file_fingerprint(ppo("whole")[0] / "ppo" / "model.safetensors")
    original, handlers = StopAtCheckpoint.on_step_end, [signal.getsignal(item) for item in (2, 15)]

    def send(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), number)
        original(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StopAtCheckpoint, "on_step_end", send)
        with pytest.raises(Interrupted) as caught:
            ppo(number.name, "--save_strategy", "no")
    assert caught.value.signal == number
    assert [signal.getsignal(item) for item in (2, 15)] == handlers
    folder, artifact, said = ppo(number.name, "--save_strategy", "no")
    assert "from step 4" in said and artifact.training["steps"] == 12
    assert file_fingerprint(folder / "ppo" / "model.safetensors") == whole


def test_a_full_disk_ends_a_stage_with_one_message_and_the_same_command_goes_on(ppo, monkeypatch):
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    for owner, name in ((state, "save_file"), (state, "_save_policy")):  # of a checkpoint, of the finished stage
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(InstructGPTError, match=r"the disk is full .* run the same command again"):
                ppo("full")
    folder, artifact, said = ppo("full")
    assert "from step 10" in said and artifact.training["steps"] == 12
    assert sorted(item.name for item in folder.iterdir()) == ["log.txt", "ppo", "reward", "sft"]


def test_a_stage_is_refused_while_another_run_writes_into_its_folder(ppo, monkeypatch):
    folder, _, _ = ppo("twice")
    record = (folder / "ppo" / "stage.json").read_bytes()
    read, write = os.pipe()
    if (other := os.fork()) == 0:
        with hold(folder, screen()):
            os.write(write, b"1")
            signal.pause()
    os.read(read, 1)
    try:
        with pytest.raises(InstructGPTError, match=rf"another run writes here \(process {other} on"):
            ppo("twice", "--seed", "3")
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    assert (folder / "ppo" / "stage.json").read_bytes() == record and not (folder / ".work").exists()
    assert "already finished" in ppo("twice")[2]


def test_a_second_signal_stops_at_once_but_not_the_echo_of_a_launcher(monkeypatch):
    run = Messages()
    with StopAtCheckpoint(run, 1) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted) as caught:
            os.kill(os.getpid(), signal.SIGINT)
        assert caught.value.signal == signal.SIGINT
    monkeypatch.setenv("WORLD_SIZE", "2")
    with StopAtCheckpoint(run, 1) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        stop.since -= 60
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
    assert len(run.lines) == 2 and "SIGTERM: stopping at the next point" in run.lines[0]


def _wait(ready):
    ready.set()
    while True:
        time.sleep(0.02)


@pytest.mark.parametrize(
    "context", [interruption.terminable(), StopAtCheckpoint(Messages(), 1)], ids=["verb", "stage"]
)
def test_workers_end_without_a_word(context, capfd):
    fork = multiprocessing.get_context("fork")
    with context, fork.Pool(2) as pool:
        assert pool.map(abs, [-1, 2]) == [1, 2]
        ready = fork.Event()
        worker = fork.Process(target=_wait, args=(ready,))
        worker.start()
        assert ready.wait(60)  # Python forgets a signal that comes while a process is being forked
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == -signal.SIGTERM
    assert capfd.readouterr().err == ""


def test_ctrl_c_leaves_a_worker_to_its_stage():
    with StopAtCheckpoint(Messages(), 1) as stop, multiprocessing.get_context("fork").Pool(1) as pool:
        os.kill(pool._pool[0].pid, signal.SIGINT)
        assert pool.map(abs, [-1, 2]) == [1, 2] and not stop.requested


def test_a_stop_saves_also_where_only_the_best_is_saved():
    stop, control = StopAtCheckpoint(Messages(), 1), TrainerControl(should_evaluate=True)
    stop.requested = True
    stop.on_step_end(None, TrainerState(global_step=2, max_steps=4), control)
    assert control.should_save and control.should_training_stop and not control.should_evaluate


def test_no_checkpoint_after_the_last_step():
    stop, control = StopAtCheckpoint(Messages(), 1), TrainerControl(should_save=True)
    stop.requested = True
    stop.on_step_end(None, TrainerState(global_step=4, max_steps=4), control)
    assert not control.should_save and not control.should_training_stop


class TestCommand:
    @pytest.fixture
    def running(self, monkeypatch):
        """The command, whose verb is stopped by SIGTERM before it trains."""
        monkeypatch.setattr(cli, "_run_verb", lambda *_: os.kill(os.getpid(), signal.SIGTERM))

    def test_sigterm_is_ctrl_c(self, running, capsys):
        before = signal.getsignal(signal.SIGTERM)
        assert cli.main(["run", "my recipe", "--output_dir", "a b"]) == 143
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "the same command resumes: instructgpt-hf run 'my recipe'" in error
        assert signal.getsignal(signal.SIGTERM) is before

    def test_full_disk(self, monkeypatch, capsys):
        def full(*_):
            raise OSError(28, os.strerror(28), "/data/merged/model.safetensors")

        monkeypatch.setattr(cli, "_run_verb", full)
        assert cli.main(["merge", "a", "b"]) == 2
        assert capsys.readouterr().err.startswith("/data/merged/model.safetensors: the disk is full")

    def test_other_errors_are_not_swallowed(self, monkeypatch):
        def broken(*_):
            raise RuntimeError("Connection closed by peer")

        monkeypatch.setattr(cli, "_run_verb", broken)
        with pytest.raises(RuntimeError):
            cli.main(["run", "x"])

    def test_a_process_that_has_ended_is_said_with_the_launchers_command(self, tmp_path, monkeypatch, capsys):
        def broken(*_):
            raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:12345")

        monkeypatch.setattr(cli, "_run_verb", broken)
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        before = signal.getsignal(signal.SIGTERM)
        try:
            assert cli.main(["run", "tiny-cpu"]) == 1
        finally:
            signal.signal(signal.SIGTERM, before)
        error = capsys.readouterr().err
        assert "Another training process has ended" in error
        assert "instructgpt-hf run tiny-cpu, started by the launcher as before" in error

    @pytest.mark.parametrize("first", ["alive", "killed"])
    def test_the_launchers_command_is_printed_once(self, tmp_path, first):
        """As torchrun does it: processes of one parent, whose command line ends with the arguments."""
        end = "SIGKILL" if first == "killed" else "SIGTERM"
        child = (
            "import os, signal, sys, time; from instructgpt_hf import cli; rank = int(os.environ['LOCAL_RANK']); "
            f"end = [signal.{end}, signal.SIGTERM][rank]; "
            "cli._run_verb = lambda *_: (time.sleep(rank), os.kill(os.getpid(), end)); "
            "sys.exit(cli.main(sys.argv[1:]))"
        )
        script, words = tmp_path / "torchrun", ["--nproc_per_node", "2", "ppo", "--config", "my recipe"]
        script.write_text(f"CHILD = {child!r}\n{LAUNCHER}")
        environment, options = (
            {**os.environ, "TMPDIR": str(tmp_path)},
            dict(capture_output=True, text=True, timeout=60),
        )
        done = subprocess.run([sys.executable, str(script), *words], env=environment, **options)
        assert done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.endswith(f"resumes: {shlex.join(['torchrun', *words])}\n")
        assert done.returncode == 143


@pytest.mark.parametrize(
    ("line", "typed"),
    [
        (["/env/bin/python", "/env/bin/accelerate", "launch", "x"], ["accelerate", "launch", "x"]),
        (["/env/bin/python3.11", "-u", "/env/bin/torchrun", "x"], ["torchrun", "x"]),
        (["python", "-m", "torch.distributed.run", "x"], ["python", "-m", "torch.distributed.run", "x"]),
        (["/env/bin/python", "launch.py", "x"], ["python", "launch.py", "x"]),
        (["srun", "torchrun", "x"], ["srun", "torchrun", "x"]),
    ],
)
def test_a_launcher_is_shown_as_it_is_typed(line, typed):
    assert interruption._as_typed(line) == typed
