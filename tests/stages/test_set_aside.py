"""What an earlier run left is set aside with a word, never deleted, and the next one may go on from it."""

import json
import shutil
import sys

import pytest
from helpers.ppo_runs import ppo_runs, screen

from instructgpt_hf.artifacts import file_fingerprint
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.stages import lifecycle

GOOD = "def length(completion_ids, **kwargs):\n    return [float(len(ids)) for ids in completion_ids]\n"
# Raises in the third iteration of the process that calls it.
BAD = """calls = []
def length(completion_ids, **kwargs):
    calls.append(1)
    1 / (len(calls) - 3)
    return [float(len(ids)) for ids in completion_ids]
"""


@pytest.fixture(scope="module")
def ppo(tokenizer, tmp_path_factory):
    """A function that runs a PPO stage with a reward function in a folder of `ppo.root`; it returns that and the log.

    `code` is what the file of the function holds then, read as by a new process.
    """
    root = tmp_path_factory.mktemp("aside")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(sys, "dont_write_bytecode", True)
        (root / "set_aside_rewards.py").write_text(GOOD)
        start = ppo_runs(root, tokenizer, reward_functions=["set_aside_rewards:length"], learning_rate=1e-2)

        def run(name, *words, code=GOOD):
            (root / "set_aside_rewards.py").write_text(code)
            sys.modules.pop("set_aside_rewards", None)
            folder, artifact, said = start(name, *words)
            return folder, artifact, said

        run.root = root
        yield run


@pytest.fixture
def stopped(ppo, request):
    """A function that gives the folder of a stage that a reward function has ended in its third iteration."""
    name = request.node.name.replace("/", "-")
    with pytest.raises(InstructGPTError) as caught:
        ppo(name, code=BAD)
    return name, str(caught.value)


@pytest.fixture(scope="module")
def whole(ppo):
    return weights(ppo("whole")[0])


def weights(folder):
    return file_fingerprint(folder / "ppo" / "model.safetensors")


def work(ppo, name):
    return sorted(
        path.relative_to(ppo.root / name / ".work").as_posix() for path in (ppo.root / name).glob(".work/*/*-*")
    )


def test_a_reward_function_that_raised_is_mended_and_the_same_command_goes_on(ppo, stopped, whole):
    name, message = stopped
    assert "reward function set_aside_rewards:length raised ZeroDivisionError" in message
    assert "run the same command again: it goes on from" in message and "checkpoint-4" in message
    folder, artifact, said = ppo(name)
    assert "resuming the interrupted stage from step 4" in said and "set aside" not in said
    (change,) = artifact.training["changed_settings"]
    assert list(change) == ["after_step", "reward_functions.set_aside_rewards:length"] and change["after_step"] == 4
    assert weights(folder) == whole and not (folder / ".work").exists()


def test_other_code_of_a_function_that_did_not_raise_needs_the_users_word(ppo, stopped, whole):
    name, _ = stopped
    (ppo.root / name / ".work" / "ppo" / "stopped.json").unlink()  # as if the run had been killed
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("instructgpt_hf.stages.stage.train", interrupt)
        ppo(name)
    assert work(ppo, name) == ["ppo.1/checkpoint-2", "ppo.1/checkpoint-4"]
    place = str(ppo.root / name / ".work" / "ppo.1" / "checkpoint-4")
    folder, artifact, said = ppo(name, "--ppo.resume_from_checkpoint", place)
    assert "resuming the interrupted stage from step 4" in said
    assert artifact.training["changed_settings"][0]["after_step"] == 4
    assert weights(folder) == whole and not (folder / ".work").exists()


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_what_has_changed_is_named_with_both_values(ppo, stopped, whole):
    name, _ = stopped
    console = screen()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("instructgpt_hf.stages.stage.train", interrupt)
        patch.setattr("helpers.ppo_runs.screen", lambda: console)
        ppo(name, "--seed", "3")
    said, aside = console.export_text(), ppo.root / name / ".work" / "ppo.1"
    assert f"checkpoints of an earlier run are set aside in {aside}, because this has changed: " in said
    assert "the code of set_aside_rewards:length (" in said and "; seed 42 -> 3. Training starts over" in said
    assert f"restore that and run it with --ppo.resume_from_checkpoint {aside}/checkpoint-4" in said
    # As it says.
    folder, _, said = ppo(name, "--ppo.resume_from_checkpoint", str(aside / "checkpoint-4"))
    assert "resuming the interrupted stage from step 4" in said and weights(folder) == whole


def test_to_start_over_deletes_nothing(ppo, stopped, whole):
    name, _ = stopped
    folder, _, said = ppo(name, "--resume_from_checkpoint", "false")
    assert "set aside in" in said and "resume_from_checkpoint = False starts over" in said
    assert work(ppo, name) == ["ppo.1/checkpoint-2", "ppo.1/checkpoint-4"] and weights(folder) == whole


def test_a_checkpoint_of_another_run_in_the_folder_is_not_used(ppo, stopped, whole):
    name, _ = stopped
    folder = ppo.root / name / ".work" / "ppo"
    foreign = json.loads((folder / "checkpoint-4" / "identity.json").read_text())
    foreign["values"]["seed"] = 3
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-6")
    (folder / "checkpoint-6" / "identity.json").write_text(json.dumps(foreign))
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-8")
    (folder / "checkpoint-8" / "identity.json").unlink()
    _, _, said = ppo(name)
    assert said.count("is of another run or stage; not used") == 2 and "from step 4" in said


def test_a_finished_stage_says_what_has_changed(ppo):
    ppo("finished", "--total_episodes", "16")
    _, _, said = ppo("finished", "--total_episodes", "32", "--beta", "0.5")
    assert "training again (beta 0.02 -> 0.5; total_episodes 16 -> 32)" in said


def test_tensorboard_shows_no_step_of_a_run_that_did_not_go_on(ppo):
    events = ("--report_to", "tensorboard")
    with pytest.raises(InstructGPTError):
        ppo("events", *events, code=BAD)
    folder, _, said = ppo("events", *events, "--seed", "3")
    assert "checkpoints and TensorBoard's files of an earlier run are set aside" in said
    assert len(list((folder / "tensorboard" / "ppo").rglob("events*"))) == 1
    assert len(list((folder / ".work" / "ppo.1" / "tensorboard").rglob("events*"))) == 1
    _, _, said = ppo("events", *events, "--seed", "4")
    assert "TensorBoard's files of an earlier run are set aside" in said, "those of a finished stage too"
    assert len(list((folder / "tensorboard" / "ppo").rglob("events*"))) == 1


def test_events_come_back_with_their_checkpoints(ppo):
    events = ("--report_to", "tensorboard")
    with pytest.raises(InstructGPTError):
        ppo("back", *events, code=BAD)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("instructgpt_hf.stages.stage.train", interrupt)
        ppo("back", *events, "--seed", "3")
    aside = ppo.root / "back" / ".work" / "ppo.1"
    folder, _, _ = ppo("back", *events, "--ppo.resume_from_checkpoint", str(aside / "checkpoint-4"))
    assert len(list((folder / "tensorboard" / "ppo").rglob("events*"))) == 2
    assert not list(folder.glob(".work/**/events*"))


def test_a_run_without_checkpoints_leaves_nothing_to_set_aside(ppo, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("instructgpt_hf.stages.stage.train", interrupt)
        ppo("early")
    assert lifecycle.read_identity(ppo.root / "early" / ".work" / "ppo")["stage"] == "ppo"
    folder, _, said = ppo("early", "--total_episodes", "16")
    assert "set aside" not in said and not (folder / ".work").exists()
