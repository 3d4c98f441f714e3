"""Bad input to every stage: one clear message, exit code 2, and nothing left behind."""

import copy
import shutil

import pytest
import torch
from helpers import stage_files
from helpers.stage_files import write_model, write_rows

from instructgpt_hf import cli, pipeline
from instructgpt_hf.artifacts import StageArtifact
from instructgpt_hf.config.recipe import load_recipe
from instructgpt_hf.errors import InstructGPTError

COMMON = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "use_cpu": True,
}
DEMONSTRATIONS = [{"prompt": f"a b {word}", "completion": f"{word} d"} for word in "efghijklmn"]
RANKINGS = [
    {"prompt": f"a {word}", "completions": ["c", f"d {word}", "e f g"], "ranks": [2, 1, 2]} for word in "efghijklmn"
]
PROMPTS = [{"prompt": f"{word} b"} for word in "efghijklmn"]


def write_recipe(folder, data, base, **changes):
    """A recipe of one step per stage on the files in `data`."""
    stages = {
        "sft": {"model_name_or_path": str(base), "dataset_name": f"{data}/demonstrations.jsonl", "max_length": 32},
        "reward": {"dataset_name": f"{data}/rankings.jsonl", "max_length": 32},
        "ppo": {
            "dataset_name": f"{data}/prompts.jsonl",
            "ptx_coef": 0.0,
            "generation_batch_size": 4,
            "max_completion_length": 4,
            "max_prompt_length": 8,
            "eval_num_prompts": 2,
        },
    }
    stages["sft"]["prompt_template"] = "raw"
    complete = {stage: {**COMMON, **values, **changes.get(stage, {})} for stage, values in stages.items()}
    return stage_files.write_recipe(folder, complete)


def run_stages(recipe, folder, *stages):
    for stage in stages:
        pipeline.run_stage(load_recipe(recipe, stages=[stage]), stage, folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """Data, a base model, a recipe, and a run whose SFT and reward stages are finished."""
    root = tmp_path_factory.mktemp("place")
    write_rows(root / "demonstrations.jsonl", DEMONSTRATIONS)
    write_rows(root / "rankings.jsonl", RANKINGS)
    write_rows(root / "prompts.jsonl", PROMPTS)
    write_recipe(root / "recipe", root, write_model(root / "base", tokenizer))
    run_stages(root / "recipe", root / "done", "sft", "reward")
    return root


@pytest.fixture(scope="module")
def other_words(place, tokenizer):
    """A base model of the same size whose tokenizer has other words, and a run of it."""
    from transformers import PreTrainedTokenizerFast

    text = tokenizer._tokenizer.to_str().replace('"w3"', '"other"')
    changed = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer._tokenizer).from_str(text), pad_token="<pad>", eos_token="<eos>"
    )
    base = write_model(place / "other_base", changed)
    run_stages(write_recipe(place / "other_recipe", place, base), place / "other", "sft", "reward")
    return place


@pytest.fixture
def refused(place, tmp_path, capsys):
    """Run a stage from the command line that must be refused; returns the message."""

    def attempt(stage, *overrides, folder=tmp_path / "run"):
        before = _contents(tmp_path)
        words = [stage, "--config", str(place / "recipe"), "--output_dir", str(folder), *map(str, overrides)]
        code = cli.main(words)
        message = capsys.readouterr().err
        assert code == 2, message
        assert "Traceback" not in message
        assert _contents(tmp_path) == before, "something was left behind"
        return " ".join(message.split())

    return attempt


@pytest.fixture
def after(place):
    """Overrides that point a later stage to the finished ones."""
    return {
        "reward": ["--sft_model_path", place / "done" / "sft"],
        "ppo": ["--sft_model_path", place / "done" / "sft", "--reward_model_path", place / "done" / "reward"],
    }


def _contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


class TestData:
    @pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
    def test_missing_file(self, refused, after, stage):
        message = refused(stage, *after.get(stage, []), "--dataset_name", "nowhere/data.jsonl")
        assert "nowhere/data.jsonl: no such file or folder" in message

    @pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
    def test_empty(self, refused, after, tmp_path, stage):
        path = tmp_path / "data.jsonl"
        path.touch()
        assert f"{path} has no rows" in refused(stage, *after.get(stage, []), "--dataset_name", path)

    @pytest.mark.parametrize(
        ("stage", "wrong", "column"),
        [
            ("sft", {"prompts": "a", "completion": "b"}, "prompt"),
            ("reward", {"prompt": "a", "completion": ["b", "c"], "ranks": [1, 2]}, "completions"),
            ("ppo", {"promt": "a"}, "prompt"),
        ],
    )
    def test_wrong_column(self, refused, after, tmp_path, stage, wrong, column):
        path = write_rows(tmp_path / "data.jsonl", [wrong] * 9)
        message = refused(stage, *after.get(stage, []), "--dataset_name", path)
        assert f"{path}: missing column '{column}' (did you mean" in message

    @pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
    def test_unreadable(self, refused, after, tmp_path, stage):
        path = tmp_path / "data.jsonl"
        path.write_text('{"prompt": ')
        assert f"{path} could not be read as jsonl" in refused(stage, *after.get(stage, []), "--dataset_name", path)

    @pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
    def test_a_single_row(self, refused, after, place, tmp_path, stage):
        rows = {"sft": DEMONSTRATIONS, "reward": RANKINGS, "ppo": PROMPTS}[stage]
        path = write_rows(tmp_path / "data.jsonl", rows[:1])
        message = refused(stage, *after.get(stage, []), "--dataset_name", path)
        assert f"{path} has 1 row; at least 2 are needed" in message

    def test_empty_answer(self, refused, tmp_path):
        path = write_rows(tmp_path / "data.jsonl", [*DEMONSTRATIONS[:5], {"prompt": "a", "completion": ""}] * 2)
        assert "completion: found ''" in refused("sft", "--dataset_name", path, "--dataset_test_split", "train")


class TestRankings:
    def attempt(self, refused, after, tmp_path, **changes):
        path = write_rows(tmp_path / "data.jsonl", [{**row, **changes} for row in RANKINGS])
        return refused("reward", *after["reward"], "--dataset_name", path)

    def test_one_completion(self, refused, after, tmp_path):
        message = self.attempt(refused, after, tmp_path, completions=["c"], ranks=[1])
        assert "row 0: completions: found 1, a ranking needs at least 2" in message

    def test_ranks_of_another_length(self, refused, after, tmp_path):
        message = self.attempt(refused, after, tmp_path, ranks=[1, 2])
        assert "row 0: ranks: found 2 for 3 completions, expected as many" in message

    def test_all_ties(self, refused, after, tmp_path):
        message = self.attempt(refused, after, tmp_path, ranks=[1, 1, 1])
        assert "no ranking is left to learn from: of 10 prompts" in message and "10 have only ties" in message


class TestLengths:
    @pytest.mark.parametrize(
        ("stage", "setting", "expected"),
        [
            ("sft", ["--max_prompt_length", "2"], "its prompt than max_prompt_length=2"),
            ("sft", ["--max_length", "5"], "longer than max_length=5 tokens"),
            ("reward", ["--max_prompt_length", "1"], "keep fewer than two completions"),
            ("reward", ["--max_length", "4"], "within max_length=4 tokens"),
            ("ppo", ["--max_prompt_length", "1"], "longer than max_prompt_length=1 tokens"),
        ],
    )
    def test_everything_is_longer_than_the_limit(self, refused, after, stage, setting, expected):
        assert expected in refused(stage, *after.get(stage, []), *setting)

    def test_demonstrations_longer_than_the_reward_models_limit(self, refused, tmp_path, place):
        """Then there is nothing to centre the scores on, which must show before training, not after."""
        long = [{"prompt": prompt, "completion": "b c d e f g h i j"} for prompt in "abcdefghij"]
        write_rows(tmp_path / "long.jsonl", long)
        recipe = write_recipe(
            tmp_path / "recipe", place, place / "base", sft={"dataset_name": f"{tmp_path}/long.jsonl"}
        )
        run_stages(recipe, tmp_path / "run", "sft")
        message = refused("reward", "--sft_model_path", tmp_path / "run" / "sft", "--max_length", "8")
        assert "center_on_demonstrations" in message and "max_length=8" in message

    def test_answers_beyond_the_models_positions(self, refused, after):
        message = refused("ppo", *after["ppo"], "--max_completion_length", "2048")
        assert "max_completion_length = 2048: with the longest prompt (2 tokens) 2050, and the policy" in message
        assert "has 2048 positions; set max_completion_length to at most 2046, or lower max_prompt_length" in message
        assert message.count("max_completion_length = 2048") == 3, "policy, reward model, value model"

    def test_pretraining_text_beyond_the_models_positions(self, refused, after, place, tmp_path):
        text = write_rows(tmp_path / "text.jsonl", [{"text": f"a b c d e f g {number}"} for number in range(400)])
        message = refused(
            "ppo", *after["ppo"], "--ptx_coef", 1, "--pretraining_dataset_name", text, "--ptx_max_length", 2049
        )
        assert "ptx_max_length = 2049: the policy" in message

    def test_examples_beyond_the_models_positions_are_left_out(self, place, tokenizer, tmp_path, capsys):
        """Also where max_length allows them: 3 or 1 tokens of a prompt, 2 or 1 of an answer, EOS."""
        base = write_model(tmp_path / "short", tokenizer, max_position_embeddings=5)
        short = [{"prompt": word, "completion": "c"} for word in "abcd"] * 10
        write_rows(tmp_path / "some.jsonl", DEMONSTRATIONS + short)
        changes = {"dataset_name": f"{tmp_path}/some.jsonl"}
        recipe = write_recipe(tmp_path / "recipe", place, base, sft=changes)
        run_stages(recipe, tmp_path / "run", "sft")
        assert "max_length = 32: the model has 5 positions; longer examples are left out" in capsys.readouterr().err
        data = StageArtifact.load(tmp_path / "run" / "sft").data["demonstrations"]
        assert 0 < data["dropped_too_long"] <= len(DEMONSTRATIONS)

    def test_fewer_prompts_than_episodes(self, refused, after):
        message = refused("ppo", *after["ppo"], "--generation_batch_size", "16", "--max_steps", "4")
        assert "9 prompts, fewer than generation_batch_size = 16" in message


class TestModels:
    @pytest.mark.parametrize("name", ["nobody-here/no-such-model", "./no/such/folder"])
    def test_unknown_model(self, refused, name):
        assert f"model_name_or_path: {name}" in refused("sft", "--model_name_or_path", name).replace("'", "")

    def test_folder_without_a_model(self, refused, tmp_path):
        (tmp_path / "empty").mkdir()
        assert "no model config could be loaded" in refused("sft", "--model_name_or_path", tmp_path / "empty")

    def test_reward_model_without_a_classifier(self, refused, after, tokenizer, tmp_path):
        sizes = dict(vocab_size=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=32, n_ctx=32)
        from transformers import AutoConfig, AutoModelForCausalLM

        AutoModelForCausalLM.from_config(AutoConfig.for_model("codegen", **sizes)).save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        message = refused("reward", *after["reward"], "--model_name_or_path", tmp_path / "base")
        assert "no sequence classifier for this architecture" in message

    def test_tokenizer_without_eos(self, refused, place, tokenizer, tmp_path):
        changed = copy.deepcopy(tokenizer)
        changed.eos_token = None
        base = write_model(tmp_path / "base", changed)
        assert "has no EOS token" in refused("sft", "--model_name_or_path", base)

    def test_chat_without_a_template(self, refused):
        assert "'chat' needs a chat template" in refused("sft", "--prompt_template", "chat")

    def test_padding_equal_to_eos_is_replaced(self, place, tokenizer, tmp_path):
        """The stages choose another padding token, so the score is read at EOS and not before it."""
        from transformers import AutoModelForSequenceClassification

        changed = copy.deepcopy(tokenizer)
        changed.pad_token = changed.eos_token
        base = write_model(tmp_path / "base", changed, pad_token_id=1)
        run_stages(write_recipe(tmp_path / "recipe", place, base), tmp_path / "run", "sft", "reward")
        assert StageArtifact.load(tmp_path / "run" / "reward").prompt_format["pad_token"] == "<pad>"
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "reward").eval()
        with torch.no_grad():
            batch = model(torch.tensor([[5, 6, 1, 0, 0], [5, 6, 7, 8, 1]])).logits[0]
            alone = model(torch.tensor([[5, 6, 1]])).logits[0]
        torch.testing.assert_close(batch, alone)


class TestPreviousStages:
    @pytest.mark.parametrize("stage", ["reward", "ppo"])
    def test_not_run(self, refused, stage, tmp_path):
        assert f"{tmp_path / 'run' / 'sft'}: the sft stage has not been run here" in refused(stage)

    def test_reward_model_not_run(self, refused, after, tmp_path):
        message = refused("ppo", *after["ppo"][:2])
        assert f"{tmp_path / 'run' / 'reward'}: the reward stage has not been run here" in message

    @pytest.mark.parametrize("stage", ["reward", "ppo"])
    def test_missing_folder(self, refused, stage):
        assert "sft stage: ./nowhere: no such folder" in refused(stage, "--sft_model_path", "./nowhere")

    def test_a_model_that_no_stage_wrote(self, refused, place, tmp_path):
        message = refused("reward", "--sft_model_path", place / "base")
        assert f"sft_model_path: {place / 'base'}: was made elsewhere (it has no stage.json), and its" in message
        assert "Name the format that it was trained with as prompt_template: instruction, raw, user-assist" in message
        assert f"{tmp_path / 'stage.json'}: not found" in refused("reward", "--sft_model_path", tmp_path)

    def test_another_stage(self, refused, place):
        message = refused("reward", "--sft_model_path", place / "done" / "reward")
        assert "is a finished 'reward' stage, expected 'sft'" in message

    def test_broken_record(self, refused, place, tmp_path):
        shutil.copytree(place / "done" / "sft", tmp_path / "sft")
        (tmp_path / "sft" / "stage.json").write_text('{"stage": "sft"')
        assert "stage.json: not valid JSON" in refused("reward", "--sft_model_path", tmp_path / "sft")

    def test_demonstrations_are_gone(self, refused, place, tmp_path):
        shutil.copytree(place / "done" / "sft", tmp_path / "sft")
        record = StageArtifact.load(tmp_path / "sft")
        record.data["demonstrations"] |= {"source": "demonstrations.jsonl", "path": "/gone/demonstrations.jsonl"}
        record.save(tmp_path / "sft")
        message = refused("reward", "--sft_model_path", tmp_path / "sft")
        assert "/gone/demonstrations.jsonl" in message and "set center_on_demonstrations: false" in message

    def test_reward_model_of_another_tokenizer(self, refused, other_words, after):
        """For the reward stage as its base model, and for PPO as the finished reward model."""
        base = other_words / "other_base"
        message = refused("reward", *after["reward"], "--model_name_or_path", base)
        assert f"base model '{base}', whose tokenizer differs from that of '{other_words / 'base'}'" in message
        message = refused("ppo", *after["ppo"][:2], "--reward_model_path", other_words / "other" / "reward")
        assert f"base model '{base}', whose tokenizer differs" in message

    @pytest.mark.parametrize("stage", ["reward", "ppo"])
    def test_another_prompt_template(self, refused, after, stage):
        message = refused(stage, *after[stage], "--prompt_template", "user-assistant")
        assert f"{stage}.yaml: prompt_template: the prompt format differs" in message
        assert "name: 'raw' there, 'user-assistant' here" in message

    def test_reward_model_of_another_template(self, refused, place, after, tmp_path):
        shutil.copytree(place / "done" / "reward", tmp_path / "reward")
        record = StageArtifact.load(tmp_path / "reward")
        record.prompt_format.update(name="instruction", template="### {prompt}")
        record.save(tmp_path / "reward")
        message = refused("ppo", *after["ppo"][:2], "--reward_model_path", tmp_path / "reward")
        assert f"{tmp_path / 'reward'}: reward model: the prompt format differs" in message


class TestFolders:
    @pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
    def test_a_file_stands_in_the_way(self, refused, after, tmp_path, stage):
        (tmp_path / "file").write_text("mine")
        folder = tmp_path / "file" / "run"
        message = refused(stage, *after.get(stage, []), folder=folder)
        # Found before a model is loaded.
        assert f"{folder}: cannot be written ({tmp_path / 'file'}: is a file); choose another --output_dir" in message
        assert (tmp_path / "file").read_text() == "mine"

    def test_read_only_folder(self, refused, tmp_path):
        folder = tmp_path / "locked"
        folder.mkdir(mode=0o555)
        try:
            (folder / "probe").touch()
        except OSError:
            assert "cannot be written" in refused("sft", folder=folder / "run")
        else:
            pytest.skip("this user may write into read-only folders")

    def test_a_file_with_the_stages_name(self, refused, tmp_path):
        """The finished model replaces a folder, never a file of the user's."""
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "sft").write_text("mine")
        assert "sft" in refused("sft")
        assert (tmp_path / "run" / "sft").read_text() == "mine"

    def test_python_api_raises_the_same_error(self, place, tmp_path):
        recipe = load_recipe(place / "recipe", ["--dataset_name", "nowhere.jsonl"], stages=["sft"])
        with pytest.raises(InstructGPTError, match=r"nowhere\.jsonl: no such file"):
            pipeline.run_stage(recipe, "sft", tmp_path / "run")
        assert not (tmp_path / "run").exists()
