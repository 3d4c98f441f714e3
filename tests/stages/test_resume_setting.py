"""`resume_from_checkpoint` in recipes and on the command line, and processes killed while a stage is finished."""

from __future__ import annotations

import os
import signal
import traceback

import pytest
from helpers.ppo_runs import ppo_runs

from instructgpt_hf import artifacts
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.stages import lifecycle
from instructgpt_hf.trainers.ppo import state as checkpoints

FILES = ("model.safetensors", "value_model/model.safetensors", "ema/model.safetensors", "rollouts.jsonl")


@pytest.fixture(scope="module")
def ppo(tokenizer, tmp_path_factory):
    """A function that runs a PPO stage in a folder of `ppo.root` and returns that folder and what was said."""
    root = tmp_path_factory.mktemp("resume")
    start = ppo_runs(root, tokenizer, learning_rate=1e-2, save_total_limit=None)

    def run(name, *words):
        folder, _, said = start(name, *words)
        return folder, said

    run.root = root
    return run


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def killed(work):
    """Do the work in a process that is killed in it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.fixture
def interrupted(ppo, monkeypatch, request):
    """The folder of a stage that was killed at the end of training, with checkpoints of the steps before."""
    name = request.node.name.replace("/", "-")
    with monkeypatch.context() as patch:
        patch.setattr(lifecycle, "finish", die)
        killed(lambda: ppo(name))
    return name


def content(folder):
    return [(folder / "ppo" / name).read_bytes() for name in FILES]


def steps(folder):
    return sorted(int(path.name.rsplit("-", 1)[1]) for path in (folder / ".work" / "ppo").glob("checkpoint-*"))


@pytest.fixture(scope="module")
def whole(ppo):
    return content(ppo("whole")[0])


@pytest.mark.parametrize("words", [["--resume_from_checkpoint"], ["--ppo.resume_from_checkpoint", "True"]])
def test_true_goes_on_from_the_newest(ppo, interrupted, whole, words):
    folder, said = ppo(interrupted, *words)
    assert "resuming the interrupted stage from step 10" in said
    assert content(folder) == whole
    assert "already finished and unchanged" in ppo(interrupted)[1], "how it was resumed does not make another result"


def test_a_path_goes_on_from_that_checkpoint_and_sets_later_ones_aside(ppo, interrupted, whole, monkeypatch):
    root = ppo.root / interrupted
    assert steps(root) == [2, 4, 6, 8, 10]
    with monkeypatch.context() as patch:
        patch.setattr("instructgpt_hf.stages.fit._match_precision", die)
        killed(lambda: ppo(interrupted, "--resume_from_checkpoint", str(root / ".work" / "ppo" / "checkpoint-4")))
    assert steps(root) == [2, 4]
    folder, said = ppo(interrupted)
    assert "from step 4" in said and content(folder) == whole


def test_false_starts_over(ppo, interrupted, whole):
    folder, said = ppo(interrupted, "--resume_from_checkpoint", "false")
    assert "resuming" not in said and content(folder) == whole


def test_a_first_run_may_ask_for_it(ppo, whole):
    folder, said = ppo("first", "--resume_from_checkpoint", "true")
    assert "resuming" not in said and content(folder) == whole


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "3", "--resume_from_checkpoint"], "were made with other settings, data or earlier stages"),
        (["--resume_from_checkpoint", "checkpoint-4"], "is not a checkpoint of the ppo stage; .* has checkpoint-2,"),
    ],
    ids=["settings", "path"],
)
def test_what_cannot_be_resumed_is_refused_and_nothing_is_lost(ppo, interrupted, words, message):
    with pytest.raises(InstructGPTError, match=message):
        ppo(interrupted, *words)
    assert steps(ppo.root / interrupted) == [2, 4, 6, 8, 10]


def test_a_path_without_any_checkpoint_is_refused(ppo):
    with pytest.raises(InstructGPTError, match="the ppo stage has no checkpoints in"):
        ppo("none", "--resume_from_checkpoint", "checkpoint-4")
    assert not (ppo.root / "none" / ".work").exists()


@pytest.mark.parametrize(
    ("owner", "name"),
    [(checkpoints, "_save_policy"), (artifacts.os, "replace"), (lifecycle, "drop_checkpoints")],
    ids=["between value model and policy", "before the stage has its name", "before its checkpoints are dropped"],
)
def test_a_stage_that_is_killed_while_it_is_written_is_whole_the_next_time(ppo, whole, monkeypatch, owner, name):
    target = f"killed in {name}"
    original = getattr(owner, name)

    def at_the_end(*arguments, **more):
        if name == "replace" and not str(arguments[1]).endswith("/ppo"):
            return original(*arguments, **more)
        return die()

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, at_the_end)
        killed(lambda: ppo(target))
    assert steps(ppo.root / target) == [2, 4, 6, 8, 10]
    folder, _ = ppo(target)
    assert content(folder) == whole
    assert sorted(item.name for item in folder.iterdir()) == ["log.txt", "ppo", "reward", "sft"]
