"""The order of a stage: what is refused has written nothing, what is finished is not loaded."""

import types

import pytest
from helpers.ppo_runs import screen

from instructgpt_hf.artifacts import StageArtifact
from instructgpt_hf.config.data import SFTArguments
from instructgpt_hf.config.recipe import StageSettings
from instructgpt_hf.config.training import SFTConfig
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.stages import stage as module
from instructgpt_hf.stages.output import Output
from instructgpt_hf.stages.run import StageRun
from instructgpt_hf.stages.stage import Outcome, Stage, train_stage

STEPS = ("read", "fingerprints", "prepare", "load", "trainer", "conclude")
RECORD = {"prompt_format": {}, "base_model": {}, "model": {}, "metrics": {}}


class Recorded(Stage):
    """A stage that notes which of its methods are called, and refuses in one of them."""

    def __init__(self, run, calls, refuses=None):
        super().__init__(run)
        self.calls, self.refuses = calls, refuses

    def _call(self, name, result=None):
        self.calls.append((name, self.run.run_folder.exists()))
        if name == self.refuses:
            raise InstructGPTError(f"{name} refuses")
        return result

    def read(self):
        return self._call("read", types.SimpleNamespace(largest=self.run.run_folder))

    def fingerprints(self, inputs):
        return self._call("fingerprints", {"base": "1"})

    def prepare(self, inputs):
        return self._call("prepare")

    def load(self, inputs):
        return self._call("load")

    def trainer(self, inputs, rows, models):
        return self._call("trainer", "a trainer")

    def conclude(self, inputs, rows, models, trainer, training):
        def save(folder):
            (folder / "model").write_text("weights")

        return self._call("conclude", Outcome(RECORD, save, "done"))


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "train", lambda trainer, run, checkpoint, boundary: {"steps": 1, "log": []})

    def build(refuses=None):
        settings = StageSettings("sft", SFTArguments(dataset_name="x"), None, SFTConfig(str(tmp_path / "x")))
        run = StageRun("recipe", settings, tmp_path / "run", "sft", Output(screen()))
        return Recorded(run, [], refuses)

    return build


@pytest.mark.parametrize("refuses", ["read", "fingerprints", "prepare", "load"])
def test_a_refused_stage_has_written_nothing(make, refuses):
    stage = make(refuses)
    with pytest.raises(InstructGPTError, match=f"{refuses} refuses"):
        train_stage(stage)
    assert not stage.run.run_folder.exists()
    assert [name for name, _ in stage.calls] == list(STEPS[: STEPS.index(refuses) + 1])


def test_a_folder_that_cannot_be_written_is_refused_before_models_are_loaded(make):
    stage = make()
    stage.run.run_folder.mkdir()
    (stage.run.run_folder / "sft").write_text("a file")
    with pytest.raises(InstructGPTError, match="is a file where a folder of the run goes"):
        train_stage(stage)
    assert [name for name, _ in stage.calls] == ["read", "fingerprints", "prepare"]


def test_the_order_of_a_stage(make):
    stage = make()
    artifact = train_stage(stage)
    assert stage.calls == [(name, name in ("trainer", "conclude")) for name in STEPS]
    assert stage.run.settings.training_args.output_dir == str(stage.run.checkpoint_folder)
    assert sorted(item.name for item in stage.run.run_folder.rglob("*")) == ["log.txt", "model", "sft", "stage.json"]
    assert StageArtifact.load(stage.run.folder).fingerprint == artifact.fingerprint


def test_a_finished_stage_is_found_before_anything_is_prepared(make):
    first = train_stage(make())
    again = make()
    assert train_stage(again).finished_at == first.finished_at
    assert [name for name, _ in again.calls] == ["read", "fingerprints"]
