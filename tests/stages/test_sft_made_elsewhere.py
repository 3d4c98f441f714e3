"""An SFT model that this package did not train, for the reward model, PPO and the evaluation."""

import copy
import json

import pytest
from helpers.stage_files import write_model, write_recipe, write_rows
from transformers import AutoTokenizer

from instructgpt_hf import pipeline
from instructgpt_hf.artifacts import StageArtifact
from instructgpt_hf.config.recipe import load_recipe
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.errors import InstructGPTError

LETTERS = "efghijklmn"
COMMON = {
    "max_steps": 1,
    "max_length": 32,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "use_cpu": True,
}
PPO = {
    "ptx_coef": 0.0,
    "generation_batch_size": 4,
    "max_completion_length": 4,
    "eval_num_prompts": 2,
    "ema_decay": 0.0,
}
CHAT = (
    "{% for turn in messages %}{{ 'z ' if turn['role'] == 'assistant' }}{{ turn['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}z {% endif %}"
)


@pytest.fixture
def place(tmp_path, tokenizer):
    rankings = [{"prompt": f"a {word}", "completions": ["c", f"d {word}"], "ranks": [2, 1]} for word in LETTERS]
    write_rows(tmp_path / "reward.jsonl", rankings)
    write_rows(tmp_path / "ppo.jsonl", [{"prompt": f"{word} b"} for word in LETTERS])
    write_model(tmp_path / "plain", tokenizer)
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = CHAT
    write_model(tmp_path / "chatty", chatty)
    return tmp_path


def recipe_of(place, model, template=None, **reward):
    own = {"sft_model_path": str(place / model), **({"prompt_template": template} if template else {})}
    files = {stage: {"dataset_name": str(place / f"{stage}.jsonl"), **own} for stage in ("reward", "ppo")}
    common = {key: value for key, value in COMMON.items() if key != "max_length"}
    recipe = {"reward": {**COMMON, **files["reward"], **reward}, "ppo": {**common, **files["ppo"], **PPO}}
    return load_recipe(write_recipe(place / "recipe", recipe), stages=["reward", "ppo"])


@pytest.mark.parametrize(("model", "template"), [("plain", "user-assistant"), ("chatty", None)])
def test_reward_model_ppo_and_evaluation(place, capsys, model, template):
    recipe, run = recipe_of(place, model, template), place / "run"
    pipeline.run_stage(recipe, "reward", run)
    assert "scores are not centred" in capsys.readouterr().err
    pipeline.run_stage(recipe, "ppo", run)
    records = [StageArtifact.load(run / stage) for stage in ("reward", "ppo")]
    assert [record.prompt_format["name"] for record in records] == [template or "chat"] * 2
    assert all(record.previous["sft"]["source"] == str(place / model) for record in records)
    assert records[0].model["reward_shift"] == 0
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    for folder in ("reward", "ppo", "ppo/value_model"):
        saved = AutoTokenizer.from_pretrained(run / folder)
        ids = saved.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert ids == PromptFormat.from_dict(records[1].prompt_format).prompt_ids(turns, saved)
    results = json.loads((run / "evaluation" / "report.json").read_text())
    assert [row["name"] for row in results["policies"]] == ["SFT", "PPO"], "no base beside the model itself"


def test_without_a_prompt_format(place):
    with pytest.raises(InstructGPTError, match=r"made elsewhere .* no chat template. Name the format .* prompt_templ"):
        pipeline.run_stage(recipe_of(place, "plain"), "reward", place / "run")


def test_scores_cannot_be_centred(place):
    recipe = recipe_of(place, "chatty", center_on_demonstrations=True)
    with pytest.raises(InstructGPTError, match=r"the demonstrations of .*chatty are not known.* Set it to false"):
        pipeline.run_stage(recipe, "reward", place / "run")
