"""Rewards that a recipe names: Python functions, several reward models, one of another tokenizer."""

import itertools
import json

import pytest
import torch
from helpers.stage_files import write_model, write_recipe, write_rows
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from instructgpt_hf import cli, pipeline
from instructgpt_hf.artifacts import StageArtifact
from instructgpt_hf.config.recipe import load_recipe
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.models.loading import load_tokenizer
from instructgpt_hf.models.reward_model import load_reward_model
from instructgpt_hf.models.scoring import score_token_lists
from instructgpt_hf.stages.reward_sources import find_functions

COMMON = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "use_cpu": True,
}
LETTERS = "efghijklmn"
ROWS = {
    "sft": [{"prompt": f"a b {word}", "completion": f"{word} d"} for word in LETTERS],
    "reward": [
        {"prompt": f"a {word}", "completions": ["c", f"d {word}", "e f g"], "ranks": [2, 1, 2]} for word in LETTERS
    ],
    "ppo": [{"prompt": f"{word} b", "target": index % 3, "user_id": word} for index, word in enumerate(LETTERS)],
}
FUNCTIONS = '''
"""Rewards of a user."""
LIMIT = 3

def close(completion_ids, target, **kwargs):
    return [-abs(len(ids) - wanted) for ids, wanted in zip(completion_ids, target)]

def seen(prompts, completions, completion_ids, user_id, **kwargs):
    assert len(prompts) == len(completions) == len(completion_ids) == len(user_id)
    return [float(prompt.startswith(user)) for prompt, user in zip(prompts, user_id)]
'''


def make_recipe(folder, root, base, template="raw", **ppo):
    stages = {
        "sft": {"model_name_or_path": str(base), "prompt_template": template, "max_length": 32},
        "reward": {"max_length": 32},
        "ppo": {
            "ptx_coef": 0.0,
            "generation_batch_size": 4,
            "max_completion_length": 4,
            "eval_num_prompts": 2,
            "ema_decay": 0.0,
            **ppo,
        },
    }
    values = {stage: {**COMMON, "dataset_name": f"{root}/{stage}.jsonl", **own} for stage, own in stages.items()}
    return write_recipe(folder, values)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """Data, functions, and two runs up to the reward model: the second with other words and another template."""
    root = tmp_path_factory.mktemp("rewards")
    for stage, rows in ROWS.items():
        write_rows(root / f"{stage}.jsonl", rows)
    (root / "own_rewards.py").write_text(FUNCTIONS)
    other = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer._tokenizer).from_str(tokenizer._tokenizer.to_str().replace('"w3"', '"User:"')),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    for name, words, template in (("run", tokenizer, "raw"), ("other", other, "user-assistant")):
        recipe = make_recipe(root / f"{name}_recipe", root, write_model(root / f"{name}_base", words), template)
        for stage in ("sft", "reward"):
            pipeline.run_stage(load_recipe(recipe, stages=[stage]), stage, root / name)
    return root


@pytest.fixture
def ppo(place, tmp_path, monkeypatch):
    """Run the PPO stage with more settings, in the folder of the functions; returns its record."""
    monkeypatch.chdir(place)

    def attempt(*words, evaluate=False):
        if not evaluate:
            monkeypatch.setattr(pipeline, "evaluate_run", lambda _: None)
        previous = ["--sft_model_path", f"{place}/run/sft"]
        if "--reward_model_path" not in words:
            previous += ["--reward_model_path", f"{place}/run/reward"]
        recipe = load_recipe(place / "run_recipe", [*previous, *words], stages=["ppo"])
        pipeline.run_stage(recipe, "ppo", tmp_path / "run")
        return StageArtifact.load(tmp_path / "run" / "ppo")

    return attempt


def last(record):
    return next(item for item in reversed(record.training["log"]) if "objective/scores" in item)


def test_functions_and_weights(ppo, place):
    names = "own_rewards:close,own_rewards:seen"
    record = ppo("--reward_functions", names, "--reward_weights", "0.0,2.0,1.0", "--missing_eos_score=-1")
    metrics = last(record)
    assert set(metrics) >= {"rewards/reward_model", "rewards/close", "rewards/seen"}
    assert metrics["rewards/seen"] == 1.0 and -4 <= metrics["rewards/close"] <= 0
    assert record.config["reward_functions"] == names.split(",")
    described = record.model["rewards"]
    assert [(item["kind"], item["name"], item["weight"]) for item in described] == [
        ("model", "reward", 0.0),
        ("function", "own_rewards:close", 2.0),
        ("function", "own_rewards:seen", 1.0),
    ]
    assert all(item["fingerprint"] for item in described[1:])
    assert record.metrics["rewards/seen"] == 1.0


def test_changed_code_of_a_function_trains_again(ppo, place, tmp_path):
    (place / "changing.py").write_text("def one(prompts, **kwargs):\n    return [1.0] * len(prompts)\n")
    words = ("--reward_functions", "changing:one")
    first = ppo(*words)
    assert ppo(*words).finished_at == first.finished_at
    (place / "changing.py").write_text("def one(prompts, **kwargs):\n    return [0.25] * len(prompts)\n")
    again = ppo(*words)
    assert again.fingerprint != first.fingerprint
    assert last(again)["rewards/one"] == 0.25, "also where Python has imported it before, as in a notebook"


def test_extra_reward_model_of_another_tokenizer(ppo, place):
    """It reads the answers' text in its own words and template; the first one reads ids."""
    record = ppo("--extra_reward_model_paths", f"{place}/other/reward", "--reward_weights", "1,0.5")
    metrics = last(record)
    assert set(metrics) >= {"rewards/reward_model", "rewards/reward_model_2"}
    total = metrics["rewards/reward_model"] + 0.5 * metrics["rewards/reward_model_2"]
    assert metrics["objective/scores"] == pytest.approx(total, abs=1e-4)
    assert record.previous["reward_2"]["source"] == f"{place}/other/reward"
    assert [item["reads"] for item in record.model["rewards"]] == ["ids", "text"]


def test_reward_model_of_another_tokenizer_with_a_value_model_of_the_policys(ppo, place, tmp_path):
    """Training and evaluation score text; the value model starts where it is told to."""
    words = ("--reward_model_path", f"{place}/other/reward", "--value_model_path", f"{place}/run/reward")
    record = ppo(*words, "--value_learning_rate", "1e-30", evaluate=True)
    assert record.previous["reward"]["source"] == f"{place}/other/reward"
    assert record.previous["value_start"]["source"] == f"{place}/run/reward"
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "ppo" / "value_model")
    start = AutoModelForSequenceClassification.from_pretrained(place / "run" / "reward")
    assert all(torch.equal(item, start.get_parameter(name)) for name, item in trained.named_parameters())
    # The evaluation's mean reward, from the answers that it wrote down and the reward model's own rendering.
    folder = place / "other" / "reward"
    own, words = PromptFormat.from_dict(StageArtifact.load(folder).prompt_format), load_tokenizer(folder)
    lines = (tmp_path / "run" / "evaluation" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    report = json.loads((tmp_path / "run" / "evaluation" / "report.json").read_text(encoding="utf-8"))
    mean = next(item for item in report["policies"] if item["name"] == "SFT")["mean_reward"]["value"]
    possible = []
    for finished in itertools.product([True, False], repeat=len(rows)):
        ids = [
            own.prompt_ids(row["prompt"], words) + own.completion_ids(row["prompt"], row["SFT"], words, ended)
            for row, ended in zip(rows, finished, strict=True)
        ]
        scores = score_token_lists(load_reward_model(folder), ids, words.pad_token_id, 2)
        possible.append(sum(scores) / len(scores))
    assert min(abs(mean - item) for item in possible) < 1e-5


class TestRefused:
    @pytest.fixture
    def refused(self, place, tmp_path, capsys, monkeypatch):
        """Nothing is loaded before the message, and nothing is left behind."""
        monkeypatch.chdir(place)
        monkeypatch.setattr("instructgpt_hf.stages.ppo.load_policy", lambda *_, **__: 1 / 0)

        def attempt(*words):
            previous = ["--sft_model_path", f"{place}/run/sft"]
            if "--reward_model_path" not in words:
                previous += ["--reward_model_path", f"{place}/run/reward"]
            run = ["ppo", "--config", str(place / "run_recipe"), "--output_dir", str(tmp_path / "run")]
            assert cli.main([*run, *previous, *words]) == 2
            assert not (tmp_path / "run").exists()
            return " ".join(capsys.readouterr().err.split())

        return attempt

    @pytest.mark.parametrize(
        ("name", "rule"),
        [
            ("own_rewards:clos", "own_rewards.py has no 'clos'; did you mean 'close'?"),
            ("own_rewards:LIMIT", "'LIMIT' in"),
            ("own_rewards", "must have the form module:function"),
            ("no_such_module:close", "there is no module 'no_such_module' in"),
            ("own_rewards.inner:close", "module 'own_rewards.inner' cannot be imported: ModuleNotFoundError"),
            ("broken_rewards:close", "module 'broken_rewards' cannot be imported: ValueError: wrong"),
            ("ending_rewards:close", "module 'ending_rewards' cannot be imported: SystemExit: no key"),
        ],
    )
    def test_functions(self, refused, place, name, rule):
        (place / "broken_rewards.py").write_text("raise ValueError('wrong')")
        (place / "ending_rewards.py").write_text("raise SystemExit('no key')")
        message = refused("--reward_functions", name)
        assert (
            "these cannot be used:" in message
            and "ppo.yaml: reward_functions" in message
            and f"{name!r}: " in message
            and rule in message
        )

    def test_all_missing_functions_are_named(self):
        with pytest.raises(InstructGPTError, match=r"(?s)'json:lods'.*did you mean 'load.*'json:dumb'"):
            find_functions(["json:lods", "json:loads", "json:dumb"])

    def test_a_function_twice(self):
        with pytest.raises(InstructGPTError, match="'json:loads': duplicate"):
            find_functions(["json:loads", "json:loads"])

    def test_a_column_whose_name_is_taken(self, refused, tmp_path):
        path = write_rows(tmp_path / "data.jsonl", [{**row, "completions": "x"} for row in ROWS["ppo"]])
        message = refused("--dataset_name", path, "--reward_functions", "own_rewards:seen")
        assert "column 'completions': reward functions receive something else under this name" in message

    def test_reward_model_that_cannot_start_the_value_model(self, refused, place):
        message = refused("--reward_model_path", f"{place}/other/reward")
        assert "whose tokenizer differs" in message and "set value_model_path" in message

    def test_value_model_of_another_tokenizer(self, refused, place):
        message = refused("--value_model_path", f"{place}/other/reward")
        assert "has another tokenizer than the policy" in message

    def test_extra_model_that_is_no_reward_stage(self, refused, place):
        message = refused("--extra_reward_model_paths", f"{place}/run/sft")
        assert "is a finished 'sft' stage, expected 'reward'" in message
