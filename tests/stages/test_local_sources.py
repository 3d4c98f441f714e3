"""Models and data by relative paths: in another directory they are found again or refused, never somebody else's."""

import json
import shutil

import pytest
import torch
from helpers.stage_files import write_model, write_recipe, write_rows

from instructgpt_hf import pipeline
from instructgpt_hf.artifacts import StageArtifact
from instructgpt_hf.config.recipe import load_recipe
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.hub.bundle import prepare
from instructgpt_hf.hub.sources import public_artifact
from instructgpt_hf.models import origins
from instructgpt_hf.models.loading import load_policy, load_tokenizer
from instructgpt_hf.models.merging import merge_adapter
from instructgpt_hf.models.origins import adapter_base, known_model
from instructgpt_hf.models.reward_model import load_reward_model

COMMON = {
    "use_peft": True,
    "lora_r": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": 1,
    "max_length": 32,
    "use_cpu": True,
}
DEMONSTRATIONS = [{"prompt": f"a {word}", "completion": f"{word} d"} for word in "efghijklmn"]
RANKINGS = [{"prompt": f"a {word}", "completions": ["c", f"d {word}"], "ranks": [2, 1]} for word in "efghijklmn"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    """A directory with `models/smol`, `my/data` and `mine`, a run of SFT and reward model by these relative names."""
    place = tmp_path_factory.mktemp("home")
    write_model(place / "models" / "smol", tokenizer)
    (place / "my" / "data").mkdir(parents=True)
    write_rows(place / "my" / "data" / "train.jsonl", DEMONSTRATIONS)
    write_rows(place / "rankings.jsonl", RANKINGS)
    sft = {"model_name_or_path": "models/smol", "dataset_name": "my/data", "prompt_template": "raw"}
    stages = {"sft": {**COMMON, **sft}, "reward": {**COMMON, "dataset_name": "rankings.jsonl"}}
    sizes = {"per_device_train_batch_size": 8, "generation_batch_size": 8, "total_episodes": 8, "use_peft": True}
    stages["ppo"] = {
        "dataset_name": "rankings.jsonl",
        "ptx_coef": 0.0,
        "gradient_accumulation_steps": 1,
        "use_cpu": True,
        **sizes,
    }
    write_recipe(place / "recipe", stages)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        recipe = load_recipe("recipe", stages=["sft", "reward"])
        for stage in ("sft", "reward"):
            pipeline.run_stage(recipe, stage, "mine")
    return place


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """A copy of that directory in `here`, with `elsewhere` as working directory; the old one is gone."""
    here = shutil.copytree(trained, tmp_path / "here")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    _move(here, str(trained), str(here))
    return here


def _move(here, before, after):
    """Put another path in place of the directory's old one, wherever a record or an adapter names it."""
    for file in [*here.rglob("stage.json"), *here.rglob("adapter_config.json")]:
        file.write_text(file.read_text().replace(before, after))


@pytest.fixture
def asked(monkeypatch, tmp_path, tokenizer):
    """Ids that the Hub was asked for; it has a stranger's model under every one of them."""
    ids, stranger = [], write_model(tmp_path / "stranger", tokenizer)
    write_other(stranger)

    def download(repo_id, **options):
        ids.append(repo_id)
        return str(stranger)

    monkeypatch.setattr(origins, "snapshot_download", download)
    return ids


def write_other(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(folder)


def forget(folder):
    """What earlier versions recorded: no places, no weights, and the base by the name in the recipe."""
    record = StageArtifact.load(folder)
    record.model.pop("bases")
    for item in (record.base_model, *record.previous.values(), *record.data.values()):
        item.pop("path"), item.pop("weights", None)
    record.save(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "models/smol"}))


USES = {
    "base": lambda folder, out: adapter_base(folder),
    "merge": lambda folder, out: merge_adapter(folder, out / "merged"),
    "policy": lambda folder, out: load_policy(folder, load_tokenizer(folder)),
    "reward model": lambda folder, out: load_reward_model(folder),
}


def uses(folder):
    return [use for name, use in USES.items() if name != ("policy" if folder.name == "reward" else "reward model")]


def test_places_are_recorded(trained):
    for stage in ("sft", "reward"):
        record = StageArtifact.load(trained / "mine" / stage)
        assert (record.base_model["id"], record.base_model["path"]) == ("models/smol", str(trained / "models/smol"))
        assert record.model["bases"]["."]["path"] == str(trained / "models/smol")
        assert record.model["bases"]["."]["weights"] == record.base_model["weights"]
        config = json.loads((trained / "mine" / stage / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(trained / "models/smol")
    assert StageArtifact.load(trained / "mine/sft").data["demonstrations"]["path"] == str(trained / "my/data")
    assert record.previous["sft"]["path"] == str(trained / "mine/sft")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_what_is_pushed_names_no_stranger(place, stage, old):
    folder = place / "mine" / stage
    if old:
        forget(folder)
    record = StageArtifact.load(folder)
    bundle = prepare(folder, record, {})
    assert json.loads(bundle.texts["adapter_config.json"])["base_model_name_or_path"] == "./smol"
    shown = public_artifact(record, as_trained=True).text()
    for name in ("models/smol", "my/data", str(place)):
        assert name not in shown and not any(name in text for text in bundle.texts.values())


@pytest.mark.parametrize("stage", ["sft", "reward"])
class TestAdapter:
    def test_its_base_is_found_from_another_directory(self, place, asked, stage, tmp_path):
        for use in uses(place / "mine" / stage):
            use(place / "mine" / stage, tmp_path)
        assert asked == []

    def test_a_base_that_is_gone(self, place, asked, stage, tmp_path):
        (place / "models" / "smol").rename(tmp_path / "moved")
        folder = place / "mine" / stage
        for use in uses(folder):
            with pytest.raises(InstructGPTError, match="models/smol: no such folder") as raised:
                use(folder, tmp_path)
            assert "base_model_name_or_path" in str(raised.value)
        assert asked == []
        # What the message says to do.
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(
            json.dumps({**config, "base_model_name_or_path": str(tmp_path / "moved")})
        )
        assert adapter_base(folder) == tmp_path / "moved"

    @pytest.mark.parametrize("old", [False, True])
    def test_another_base_in_its_place(self, place, asked, stage, tmp_path, old, monkeypatch):
        if old:
            forget(place / "mine" / stage)
            monkeypatch.chdir(place)
        write_other(place / "models" / "smol")
        for use in uses(place / "mine" / stage):
            with pytest.raises(InstructGPTError, match="is another model than that of training"):
                use(place / "mine" / stage, tmp_path)

    def test_an_old_record(self, place, asked, stage, tmp_path, monkeypatch):
        folder = place / "mine" / stage
        forget(folder)
        for use in uses(folder):
            with pytest.raises(InstructGPTError, match="is another model than that of training"):
                use(folder, tmp_path)
        assert set(asked) == {"models/smol"}
        # The Hub's model of this id is the one of training.
        monkeypatch.setattr(origins, "snapshot_download", lambda *args, **options: str(place / "models/smol"))
        assert adapter_base(folder) == place / "models/smol"
        monkeypatch.chdir(place)
        for use in uses(folder):
            use(folder, tmp_path)

    def test_notes_beside_the_weights_do_not_matter(self, place, stage):
        (place / "models/smol/README.md").write_text("my notes")
        (place / "models/smol/.cache").mkdir()
        (place / "models/smol/.cache/notes").write_text("")
        assert adapter_base(place / "mine" / stage) == place / "models/smol"


def test_later_stages_and_the_evaluation(place, asked, tmp_path):
    """Reward stage, PPO and evaluation in another directory, with and without the base."""
    words = ["--sft_model_path", str(place / "mine/sft"), "--reward.dataset_name", str(place / "rankings.jsonl")]
    reward = load_recipe(place / "recipe", words, stages=["reward"])
    words = [*words[:2], "--reward_model_path", f"{place}/mine/reward", "--dataset_name", f"{place}/rankings.jsonl"]
    ppo = load_recipe(place / "recipe", words, stages=["ppo"])
    evaluated = pipeline._policy_run(ppo, place / "mine", pipeline.Output())
    (place / "models" / "smol").rename(tmp_path / "moved")
    for act in (
        lambda: pipeline.run_stage(reward, "reward", "new"),
        lambda: pipeline.run_stage(ppo, "ppo", "new"),
        lambda: pipeline.evaluate_run(evaluated),
    ):
        with pytest.raises(InstructGPTError, match="models/smol: no such folder"):
            act()
    assert asked == []
    (tmp_path / "moved").rename(place / "models" / "smol")
    (record,) = pipeline.run_stage(reward, "reward", "new")
    assert record.metrics["demonstrations_scored"] == len(DEMONSTRATIONS)


@pytest.mark.parametrize("change", ["other rows", "gone"])
def test_demonstrations_that_are_not_those_of_training(place, change):
    if change == "gone":
        shutil.rmtree(place / "my")
    else:
        write_rows(place / "my/data/train.jsonl", DEMONSTRATIONS[1:])
    words = ["--sft_model_path", str(place / "mine/sft"), "--dataset_name", str(place / "rankings.jsonl")]
    recipe = load_recipe(place / "recipe", words, stages=["reward"])
    with pytest.raises(InstructGPTError, match=r"my/data.*set center_on_demonstrations: false"):
        pipeline.run_stage(recipe, "reward", "new")


def test_a_base_from_the_hub_is_found_by_its_commit(tmp_path, tokenizer, monkeypatch):
    """The cache was emptied since, and a folder here has the name of the repository."""
    commit = "0123456789" * 4
    snapshot = tmp_path / "hub" / "models--org--base" / "snapshots" / commit
    write_model(snapshot, tokenizer)
    record = origins.origin("org/base", "main", snapshot)
    assert (record["path"], record["revision"]) == (None, commit)
    write_model(tmp_path / "org" / "base", tokenizer)
    write_other(tmp_path / "org" / "base")
    monkeypatch.chdir(tmp_path)
    asked = []

    def download(repo_id, revision, **options):
        asked.append((repo_id, revision))
        return str(snapshot)

    monkeypatch.setattr(origins, "snapshot_download", download)
    assert known_model(record, "base model", "") == snapshot
    assert asked == [("org/base", commit)]
