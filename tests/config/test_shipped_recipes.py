"""The recipes that ship: they parse, their keys exist, their comments name a source, and they can be copied."""

import re

import pytest
import yaml

from instructgpt_hf.config.catalog import copy_recipe, list_recipes, recipe_folder, recipes_root
from instructgpt_hf.config.recipe import load_recipe
from instructgpt_hf.config.settings import stage_settings
from instructgpt_hf.errors import InstructGPTError

NAMES = ["pythia-1.4b-6.9b", "qwen3-qlora-t4", "smollm2-135m", "tiny-cpu"]
STAGES = ["sft", "reward", "ppo"]


def test_list():
    found = list_recipes()
    assert [name for name, _, _ in found] == NAMES
    for name, description, folder in found:
        assert 20 < len(description) <= 120 and folder == recipe_folder(name)


@pytest.mark.parametrize("name", NAMES)
def test_it_loads(name):
    recipe = load_recipe(name)
    assert recipe.name == name and list(recipe.stages) == STAGES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stage", STAGES)
def test_every_key_is_a_field(name, stage):
    values = yaml.safe_load((recipe_folder(name) / f"{stage}.yaml").read_text())
    assert set(values) <= set(stage_settings(stage))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stage", STAGES)
def test_every_changed_number_says_where_it_comes_from(name, stage):
    settings = load_recipe(name, stages=[stage]).stages[stage]
    lines = (recipe_folder(name) / f"{stage}.yaml").read_text().splitlines()
    free = {"seed", "save_steps", "gradient_accumulation_steps", "per_device_train_batch_size"}
    for key, value in settings.changed().items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key not in free:
            line = next(item for item in lines if item.startswith(f"{key}:"))
            assert re.search(r"#.*(ours|C\.\d|App C|§|E\.9)", line), f"{name}/{stage}.yaml: {line}"


@pytest.mark.parametrize("name", NAMES)
def test_readme(name):
    text = (recipe_folder(name) / "README.md").read_text()
    assert f"instructgpt-hf run {name}" in text
    assert "hardware" in text and "What success looks like" in text and "differs from the paper" in text
    assert f"[{name}]({name}/README.md)" in (recipes_root() / "README.md").read_text()


def test_commands_of_the_readmes_parse():
    """Every `run` and single-stage command in a README is accepted by the loader."""
    for name in NAMES:
        text = (recipe_folder(name) / "README.md").read_text().replace("\\\n", " ")
        for line in re.findall(r"^instructgpt-hf ((?:run|sft|reward|ppo) .*)$", text, re.M):
            verb, *words = line.split()
            if verb == "run":
                source, *words = words
            else:
                index = words.index("--config")
                source = words[index + 1]
                del words[index : index + 2]
            if "--output_dir" in words:
                index = words.index("--output_dir")
                del words[index : index + 2]
            load_recipe(source, words, stages=STAGES if verb == "run" else [verb])


def test_tiny_cpu_uses_only_the_lab():
    recipe = load_recipe("tiny-cpu")
    assert recipe.stages["sft"].model_args.model_name_or_path == "lab"
    for settings in recipe.stages.values():
        assert settings.data_args.dataset_name.startswith("lab:")
    assert recipe.stages["ppo"].training_args.compare_without_ptx


def test_the_paper_s_shape_has_the_paper_s_numbers():
    recipe = load_recipe("pythia-1.4b-6.9b")
    sft, reward, ppo = (recipe.stages[stage].training_args for stage in STAGES)
    assert (sft.learning_rate, sft.num_train_epochs, sft.pretraining_mix) == (5e-6, 2, 0.1)  # C.3, 1.3B
    assert sft.per_device_train_batch_size * sft.gradient_accumulation_steps == 32  # C.3
    assert (reward.learning_rate, reward.num_train_epochs) == (9e-6, 1)  # C.2
    assert reward.per_device_train_batch_size * reward.gradient_accumulation_steps == 64  # C.2
    assert (ppo.generation_batch_size, ppo.minibatch_size, ppo.total_episodes) == (512, 64, 256_000)  # C.4
    assert (ppo.beta, ppo.epsilon, ppo.ema_decay, ppo.ptx_coef) == (0.02, 0.2, 0.992, 27.8)  # C.4
    assert (ppo.value_learning_rate, ppo.ptx_episodes_ratio, ppo.warmup_iterations) == (9e-6, 8, 10)  # C.4


def test_smollm2_fits_a_cpu_with_8_gb():
    """Memory of a CPU run in GiB by what was measured with weights of that shape, without a GPU's half precision.

    Everything but activations takes 2.6, activations of LoRA 1.4 MiB per token, and float32 logits over 49,152 tokens
    are held about four times (logits, log-softmax, two gradients). Measured: SFT 4.5, reward model 5.4.
    """
    recipe = load_recipe("smollm2-135m")
    sft, reward, ppo = (recipe.stages[stage].training_args for stage in STAGES)

    def gib(tokens, logits):
        return 2.6 + tokens * 1.4 / 2**10 + 4 * logits * 49_152 * 4 / 2**30

    batch = sft.per_device_train_batch_size * sft.max_length
    assert gib(batch, batch) < 6.5
    assert gib(0, sft.per_device_eval_batch_size * sft.max_length) < 6.5
    assert gib(reward.max_tokens_per_forward, 0) < 6.5
    assert reward.max_tokens_per_forward >= 2 * reward.max_length  # else a pair is computed twice
    episodes = ppo.per_device_train_batch_size
    assert (
        gib(episodes * (ppo.max_prompt_length + ppo.max_completion_length), episodes * ppo.max_completion_length) < 6.5
    )
    assert gib(episodes * ppo.ptx_max_length, episodes * ppo.ptx_max_length) < 6.5
    assert sft.per_device_train_batch_size * sft.gradient_accumulation_steps == 32  # C.3


def test_copy_and_load_the_copy(tmp_path):
    folder = copy_recipe("tiny-cpu", tmp_path / "mine")
    assert sorted(item.name for item in folder.iterdir()) == ["README.md", "ppo.yaml", "reward.yaml", "sft.yaml"]
    assert load_recipe(folder).name == "mine"
    with pytest.raises(InstructGPTError, match="exists already"):
        copy_recipe("tiny-cpu", folder)
    with pytest.raises(InstructGPTError, match="did you mean 'tiny-cpu'"):
        copy_recipe("tinycpu", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_local_folder_comes_before_a_shipped_name(tmp_path, monkeypatch):
    copy_recipe("tiny-cpu", tmp_path / "smollm2-135m")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("smollm2-135m").stages["sft"].model_args.model_name_or_path == "lab"
