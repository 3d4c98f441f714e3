"""A recipe without a reward model: reward functions alone, for tasks whose answers a program can check."""

import itertools

import pytest
import torch
from helpers.stage_files import write_model, write_recipe, write_rows

from instructgpt_hf import InstructGPTError, load_recipe, load_reward_model, pipeline
from instructgpt_hf.artifacts import StageArtifact
from instructgpt_hf.evaluation.judges import RewardFunctionsJudge, SampledCompletions
from instructgpt_hf.hub.card import render_card

COMMON = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "use_cpu": True,
}
LETTERS = "efghijklmn"
FUNCTIONS = """
def close(completion_ids, target, **kwargs):
    return [-abs(len(ids) - wanted) for ids, wanted in zip(completion_ids, target)]

async def starts(completions, **kwargs):
    return [1.0 if text.startswith("a") else None for text in completions]
"""


@pytest.fixture
def recipe(tmp_path, tokenizer, monkeypatch):
    """Folder of a recipe without reward.yaml; the functions are in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_rows(tmp_path / "sft.jsonl", [{"prompt": f"a b {word}", "completion": f"{word} d"} for word in LETTERS])
    write_rows(tmp_path / "ppo.jsonl", [{"prompt": f"{word} b", "target": i % 3} for i, word in enumerate(LETTERS)])
    (tmp_path / "checkable.py").write_text(FUNCTIONS)
    base = write_model(tmp_path / "base", tokenizer)

    numbers = itertools.count()

    def write(**ppo):
        own = {
            "ptx_coef": 0.0,
            "generation_batch_size": 4,
            "max_completion_length": 4,
            "eval_num_prompts": 1,
            "ema_decay": 0.0,
            "dataset_name": "ppo.jsonl",
            "reward_functions": ["checkable:close", "checkable:starts"],
            "reward_weights": [1.0, 0.5],
            **ppo,
        }
        stages = {
            "sft": {
                **COMMON,
                "model_name_or_path": str(base),
                "prompt_template": "raw",
                "max_length": 32,
                "dataset_name": "sft.jsonl",
            },
            "ppo": {**COMMON, **{key: value for key, value in own.items() if value is not None}},
        }
        return write_recipe(tmp_path / f"recipe{next(numbers)}" / "checkable", stages)

    return write


@pytest.mark.parametrize("peft", [False, True], ids=["whole", "lora"])
def test_run_trains_and_measures_without_a_reward_model(recipe, tmp_path, capsys, peft):
    settings = ["--use_peft", "--lora_r", "4"] if peft else []
    rows = pipeline.run(load_recipe(recipe(), settings, output_dir="run"), "run")
    assert [row.name for row in rows] == ["base", "SFT", "PPO"]
    run = tmp_path / "run"
    assert not (run / "reward").exists()
    record = StageArtifact.load(run / "ppo")
    assert record.previous.keys() == {"sft"} and record.model["reward_shift"] is None
    assert [(item["kind"], item["name"], item["weight"]) for item in record.model["rewards"]] == [
        ("function", "checkable:close", 1.0),
        ("function", "checkable:starts", 0.5),
    ]
    assert record.metrics["judge"] == "the reward functions it was trained on"
    value = load_reward_model(run / "ppo" / "value_model")
    assert value(input_ids=torch.tensor([[5, 6, 1]])).logits.shape == (1, 1)
    assert "value_warmup_iterations" in capsys.readouterr().err
    # Finished and unchanged: nothing is trained again.
    before = (run / "ppo" / "stage.json").stat().st_mtime_ns
    again = load_recipe(recipe(), settings, stages=["ppo"], output_dir="run")
    assert pipeline.run_stage(again, "ppo", "run", part_of_run=True)[0].fingerprint == record.fingerprint
    assert (run / "ppo" / "stage.json").stat().st_mtime_ns == before
    card = str(render_card(record))
    assert "reinforcement learning against reward functions" in card and "reward model's" not in card


def test_next_step_after_sft_is_ppo(recipe, capsys):
    pipeline.run_stage(load_recipe(recipe(), stages=["sft"], output_dir="run"), "sft", "run")
    assert "Next: `instructgpt-hf ppo " in capsys.readouterr().err


def test_one_function_needs_no_weight(recipe):
    loaded = load_recipe(recipe(reward_functions=["checkable:close"], reward_weights=None))
    assert list(loaded.stages) == ["sft", "ppo"] and not loaded.stages["ppo"].reward_stage
    with pytest.raises(InstructGPTError, match=r"reward_weights = .*must have 2 values: for each of extra"):
        load_recipe(recipe(reward_weights=[1.0, 0.5, 0.1]))
    with pytest.raises(InstructGPTError, match="has no meaning with one reward"):
        load_recipe(recipe(reward_functions=["checkable:close"], reward_weights=[1.0]))


def test_recipe_without_any_reward_is_refused(recipe):
    with pytest.raises(InstructGPTError, match=r"reward\.yaml: not found.*ppo\.yaml must set reward_functions"):
        load_recipe(recipe(reward_functions=None, reward_weights=None))


def test_reward_model_from_elsewhere_needs_no_reward_stage(recipe):
    loaded = load_recipe(recipe(reward_model_path="my-org/reward", reward_weights=[1.0, 1.0, 1.0]))
    assert list(loaded.stages) == ["sft", "ppo"]
    assert load_recipe(recipe(reward_model_path="my-org/reward", reward_functions=None, reward_weights=None))


def test_judge_adds_what_the_functions_return():
    def length(completions, target, **_):
        return [len(item[0]["content"]) - wanted for item, wanted in zip(completions, target, strict=True)]

    async def maybe(prompts, **_):
        return [None, 2.0]

    turns = [[{"role": "user", "content": "a"}]] * 2
    sampled = SampledCompletions(turns, [[1], [1]], [[2], [3]], ["four", "threes"], [True, True])
    judge = RewardFunctionsJudge([length, maybe], [1.0, 10.0], {"target": [1, 2]})
    assert judge.scores(sampled) == [3.0, 24.0]
