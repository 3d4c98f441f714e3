"""The three stages with LoRA: adapters on one base that never changes, each starting from the one before."""

import json

import pytest
import torch
from helpers.stage_files import write_model, write_recipe, write_rows
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from instructgpt_hf import pipeline
from instructgpt_hf.artifacts import StageArtifact
from instructgpt_hf.config.recipe import load_recipe
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.models.loading import load_tokenizer
from instructgpt_hf.models.merging import merge_adapter
from instructgpt_hf.models.reward_model import load_reward_model
from instructgpt_hf.models.scoring import reward_shift, score_token_lists
from instructgpt_hf.trainers.ppo.reference import reference_log_probs

COMMON = {
    "use_peft": True,
    "lora_r": 4,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "use_cpu": True,
}
STAGES = {
    "sft": {"prompt_template": "raw", "max_length": 32, "max_steps": 3},
    "reward": {"max_length": 32, "max_steps": 3},
    "ppo": {
        "ptx_coef": 1.0,
        "ptx_episodes_ratio": 1,
        "ptx_max_length": 8,
        "generation_batch_size": 8,
        "max_completion_length": 4,
        "total_episodes": 16,
        "value_learning_rate": 1e-2,
        "eval_num_prompts": 2,
        "ema_decay": 0.9,
        "warmup_iterations": 1,
    },
}
DATA = {
    "sft": [{"prompt": f"a b {word}", "completion": f"{word} d"} for word in "efghijklmn"],
    "reward": [
        {"prompt": f"a {word}", "completions": ["c", f"d {word}", "e f g"], "ranks": [2, 1, 3]}
        for word in "efghijklmn"
    ],
    "ppo": [{"prompt": f"{word} b"} for word in "efghijklmnopqrst"],
    "text": [{"text": f"{word} a b c d e f g h"} for word in "efghijklmn"],
}
SEQUENCES = [[5, 6, 7, 1], [8, 9, 10, 11, 1], [12, 1]]


def _prepare(root, tokenizer, **changes):
    """A base model whose rows fill the blocks of 4-bit weights, the data, and a recipe."""
    write_model(root / "base", tokenizer, hidden_size=64)
    for name, rows in DATA.items():
        write_rows(root / f"{name}.jsonl", rows)
    own = {
        "sft": {"model_name_or_path": f"{root}/base"},
        "reward": {},
        "ppo": {"pretraining_dataset_name": f"{root}/text.jsonl"},
    }
    write_recipe(
        root / "recipe",
        {
            stage: {**COMMON, **values, **own[stage], **changes, "dataset_name": f"{root}/{stage}.jsonl"}
            for stage, values in STAGES.items()
        },
    )
    return load_recipe(root / "recipe")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    """A finished run of adapters; beside the stages' folders, what was seen of them on the way."""
    root = tmp_path_factory.mktemp("adapters")
    recipe = _prepare(root, tokenizer)
    before = _bytes(root / "base")
    with pytest.MonkeyPatch.context() as patch:
        seen = _watch_the_start_of_ppo(patch)
        for stage in ("sft", "reward", "ppo"):
            pipeline.run_stage(recipe, stage, root)
    assert _bytes(root / "base") == before
    (root / "seen.json").write_text(json.dumps(seen))
    return root


def _bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _watch_the_start_of_ppo(patch):
    """Compare policy and reference with the SFT adapter, and the value model with the reward model, before a step."""
    from instructgpt_hf.stages import stage

    seen, original = {}, stage.train

    def watched(trainer, stage_run, *arguments):
        if stage_run.settings.stage != "ppo":
            return original(trainer, stage_run, *arguments)
        sft = AutoPeftModelForCausalLM.from_pretrained(stage_run.run_folder / "sft").eval()
        reward = load_reward_model(stage_run.run_folder / "reward")
        policy, ids = trainer.actor_critic.policy.eval(), torch.tensor([SEQUENCES[1]])
        mask = torch.ones_like(ids)
        with torch.no_grad():
            expected = torch.log_softmax(sft(ids).logits[:, :-1], -1).gather(2, ids[:, 1:, None]).squeeze(2)
            found = reference_log_probs(trainer.actor_critic, trainer.ref_model, ids, mask, 4)
            own = torch.log_softmax(policy(ids).logits[:, :-1], -1).gather(2, ids[:, 1:, None]).squeeze(2)
            values = trainer.actor_critic.values(torch.tensor([SEQUENCES[1] + [0]]), torch.ones(1, 6), 1)[0, 0]
        seen["reference"] = (found - expected).abs().max().item()
        seen["policy"] = (own - expected).abs().max().item()
        seen["value"] = abs(values.item() - score_token_lists(reward, [SEQUENCES[1]], 0, 1)[0])
        seen["trainable"] = sorted(
            name for name, item in trainer.actor_critic.named_parameters() if item.requires_grad
        )
        result = original(trainer, stage_run, *arguments)
        with torch.no_grad():
            policy.eval()
            after = reference_log_probs(trainer.actor_critic, trainer.ref_model, ids, mask, 4)
        seen["reference_after"] = (after - expected).abs().max().item()
        return result

    patch.setattr(stage, "train", watched)
    return seen


def test_every_stage_saves_an_adapter(run):
    for folder in ("sft", "reward", "ppo-ptx", "ppo-ptx/value_model", "ppo-ptx/ema"):
        assert (run / folder / "adapter_model.safetensors").is_file(), folder
        assert not (run / folder / "model.safetensors").exists(), folder
        config = json.loads((run / folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(run / "base"), folder
    for stage in ("sft", "reward", "ppo-ptx"):
        assert StageArtifact.load(run / stage).model["kind"] == "adapter"
    assert not (run / ".work").exists()


def test_all_rewards_are_adapters_on_the_policys_base(run, tmp_path, monkeypatch):
    """Also a second reward model, and one that the value model does not start from."""
    from instructgpt_hf.stages import stage

    hosts, original = [], stage.train

    def watched(trainer, *arguments):
        policy = trainer.actor_critic.policy
        hosts.append([function.model.host is policy for function in trainer.reward_funcs])
        return original(trainer, *arguments)

    monkeypatch.setattr(stage, "train", watched)
    words = {
        "sft_model_path": f"{run}/sft",
        "reward_model_path": f"{run}/reward",
        "extra_reward_model_paths": f"{run}/reward",
        "reward_weights": "1,0.5",
        "value_model_path": f"{run}/ppo-ptx/value_model",
    }
    overrides = [word for key, value in words.items() for word in (f"--{key}", value)]
    recipe = load_recipe(run / "recipe", overrides, stages=["ppo"])
    pipeline.run_stage(recipe, "ppo", tmp_path)
    assert hosts == [[True, True]]
    metrics = StageArtifact.load(tmp_path / "ppo-ptx").metrics
    assert metrics["rewards/reward_model"] == pytest.approx(metrics["rewards/reward_model_2"], abs=1e-5)
    assert metrics["objective/scores"] == pytest.approx(1.5 * metrics["rewards/reward_model"], abs=1e-5)


def test_head_is_saved_with_the_adapter(run):
    for folder in ("reward", "ppo-ptx/value_model"):
        weights = load_file(run / folder / "adapter_model.safetensors")
        assert [name for name in weights if "score" in name] == ["base_model.model.score.weight"]
    for folder in ("sft", "ppo-ptx", "ppo-ptx/ema"):
        assert not [name for name in load_file(run / folder / "adapter_model.safetensors") if "score" in name]


def test_each_adapter_was_trained(run):
    """Every adapter differs from the one it started as, in every matrix."""
    for later, earlier in (("reward", "sft"), ("ppo-ptx", "sft"), ("ppo-ptx/value_model", "reward")):
        first, second = (load_file(run / folder / "adapter_model.safetensors") for folder in (earlier, later))
        assert set(first) <= set(second)
        assert [name for name in first if torch.equal(first[name], second[name])] == [], (earlier, later)


def test_ppo_starts_from_the_earlier_stages(run):
    seen = json.loads((run / "seen.json").read_text())
    assert seen["policy"] == pytest.approx(0, abs=1e-5)
    assert seen["reference"] == pytest.approx(0, abs=1e-5)
    assert seen["value"] == pytest.approx(0, abs=1e-5)


def test_reference_stays_while_the_policy_trains(run):
    seen = json.loads((run / "seen.json").read_text())
    assert seen["reference_after"] == pytest.approx(0, abs=1e-5)
    assert seen["trainable"] and not [name for name in seen["trainable"] if ".ref." in name]
    roles = {name.split(".")[0] for name in seen["trainable"]}
    assert roles == {"policy", "value_model"}


def test_policy_loads_with_peft(run):
    ids = torch.tensor([SEQUENCES[1]])
    logits = {}
    for folder in ("sft", "ppo-ptx", "ppo-ptx/ema"):
        policy = AutoPeftModelForCausalLM.from_pretrained(run / folder).eval()
        assert list(policy.peft_config) == ["default"]
        with torch.no_grad():
            logits[folder] = policy(ids).logits
    assert not torch.allclose(logits["ppo-ptx"], logits["sft"], atol=1e-3)
    assert not torch.allclose(logits["ppo-ptx/ema"], logits["ppo-ptx"], atol=1e-5)


def test_reward_model_keeps_its_shift(run):
    model = load_reward_model(run / "reward")
    assert reward_shift(model) == StageArtifact.load(run / "reward").model["reward_shift"] != 0.0
    plain = AutoModelForSequenceClassification.from_pretrained(run / "reward", num_labels=1).eval()
    with torch.no_grad():
        raw = [plain(input_ids=torch.tensor([ids])).logits.item() for ids in SEQUENCES]
    shifted = [value - reward_shift(model) for value in raw]
    assert score_token_lists(model, SEQUENCES, load_tokenizer(run / "reward").pad_token_id, 2) == pytest.approx(
        shifted, abs=1e-5
    )


def test_value_model_loads(run):
    value_model = load_reward_model(run / "ppo-ptx" / "value_model")
    reward = load_reward_model(run / "reward")
    assert reward_shift(value_model) == reward_shift(reward)
    assert score_token_lists(value_model, SEQUENCES, 0, 2) != score_token_lists(reward, SEQUENCES, 0, 2)


def test_merged_models_run_the_next_stages(run, tmp_path):
    """The reward stage on the merged SFT model, and PPO on merged models, without an adapter in sight."""
    sft, reward = (str(merge_adapter(run / stage, tmp_path / stage)) for stage in ("sft", "reward"))
    expected = score_token_lists(load_reward_model(run / "reward"), SEQUENCES, 0, 2)
    assert score_token_lists(load_reward_model(reward), SEQUENCES, 0, 2) == pytest.approx(expected, abs=1e-4)
    changes = ["--sft_model_path", sft, "--use_peft=false"]
    recipe = load_recipe(run / "recipe", changes, stages=["reward"])
    pipeline.run_stage(recipe, "reward", tmp_path / "new")
    recipe = load_recipe(run / "recipe", [*changes, "--reward_model_path", reward], stages=["ppo"])
    pipeline.run_stage(recipe, "ppo", tmp_path / "new")
    for stage in ("reward", "ppo-ptx"):
        assert StageArtifact.load(tmp_path / "new" / stage).model["kind"] == "full"
    record = StageArtifact.load(tmp_path / "new" / "ppo-ptx")
    assert record.previous["reward"]["source"] == reward
    assert record.model["reward_shift"] == StageArtifact.load(run / "reward").model["reward_shift"]


@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_settings_of_another_adapter_are_refused(run, stage):
    recipe = load_recipe(run / "recipe", ["--lora_r", "8", "--use_peft=false"], stages=[stage])
    with pytest.raises(InstructGPTError, match=rf"{stage}.yaml: this stage continues(.|\n)*use_peft(.|\n)*lora_r = 8"):
        pipeline.run_stage(recipe, stage, run)


def test_4_bit_run(tmp_path, tokenizer, monkeypatch):
    """Scores at the end of training are those of the folder, and of the merged model."""
    from instructgpt_hf.stages import reward

    seen, save = {}, reward.save_reward_model

    def watched(model, folder):
        seen["trained"] = score_token_lists(model, SEQUENCES, 0, 2)
        save(model, folder)

    monkeypatch.setattr(reward, "save_reward_model", watched)
    recipe = _prepare(tmp_path, tokenizer, load_in_4bit=True)
    for stage in ("sft", "reward"):
        pipeline.run_stage(recipe, stage, tmp_path)
    merged = merge_adapter(tmp_path / "reward", tmp_path / "merged")
    for folder in (tmp_path / "reward", merged):
        found = score_token_lists(load_reward_model(folder), SEQUENCES, 0, 2)
        assert found == pytest.approx(seen["trained"], abs=1e-4), folder
    unquantised = load_reward_model(tmp_path / "reward", quantization_config=None)
    assert score_token_lists(unquantised, SEQUENCES, 0, 2) != pytest.approx(seen["trained"], abs=1e-3)
    assert StageArtifact.load(merged).model["kind"] == "full"
