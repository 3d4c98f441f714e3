"""The loader: precedence, overrides, and every problem of all files at once."""

import os
from pathlib import Path

import pytest

from instructgpt_hf.config.recipe import load_recipe
from instructgpt_hf.config.settings import stage_settings
from instructgpt_hf.errors import InstructGPTError

GOOD = {
    "sft": "model_name_or_path: some/model\ndataset_name: demos.jsonl\nprompt_template: raw\n",
    "reward": "dataset_name: rankings.jsonl\n",
    "ppo": "dataset_name: prompts.jsonl\npretraining_dataset_name: text.jsonl\n",
}


@pytest.fixture
def write(tmp_path):
    """Write a recipe whose files have these lines more, or are these texts, and return its folder."""

    def build(replace=None, **more):
        folder = tmp_path / "mine"
        folder.mkdir(exist_ok=True)
        for stage, text in GOOD.items():
            (folder / f"{stage}.yaml").write_text((replace or {}).get(stage, text + more.get(stage, "")))
        return folder

    return build


def problems_of(*arguments, **options):
    with pytest.raises(InstructGPTError) as caught:
        load_recipe(*arguments, **options)
    title, *items = str(caught.value).split("\n  - ")
    assert "cannot be used" in title
    return items


def the_problem(*arguments, **options):
    items = problems_of(*arguments, **options)
    assert len(items) == 1, items
    return items[0]


class TestReading:
    def test_values_reach_their_dataclass(self, write, tmp_path):
        recipe = load_recipe(write(sft="learning_rate: 2e-5\nuse_peft: true\n"), output_dir=tmp_path / "run")
        assert recipe.name == "mine" and list(recipe.stages) == ["sft", "reward", "ppo"]
        sft = recipe.stages["sft"]
        assert sft.data_args.dataset_name == "demos.jsonl"
        assert sft.model_args.model_name_or_path == "some/model" and sft.model_args.use_peft is True
        assert sft.training_args.learning_rate == 2e-5
        assert sft.training_args.output_dir == str(tmp_path / "run" / "sft")
        assert not (tmp_path / "run").exists()

    def test_default_output(self, write):
        recipe = load_recipe(write())
        assert recipe.stages["ppo"].training_args.output_dir == os.path.join("runs", "mine", "ppo")

    def test_changed_and_defaults(self, write):
        settings = load_recipe(write(ppo="beta: 0.02\nlam: 0.9\n")).stages["ppo"]
        assert settings.values["beta"] == 0.02
        assert settings.changed() == {
            "dataset_name": "prompts.jsonl",
            "pretraining_dataset_name": "text.jsonl",
            "lam": 0.9,
        }
        defaults = settings.defaults_with_source()
        assert defaults["beta"] == (0.02, "C.4")
        assert "weight_decay" not in defaults

    def test_one_stage_from_its_folder_or_file(self, write):
        folder = write()
        for source in (folder, folder / "reward.yaml"):
            recipe = load_recipe(source, stages=["reward"])
            assert recipe.name == "mine" and list(recipe.stages) == ["reward"]
        with pytest.raises(InstructGPTError, match="one stage's file"):
            load_recipe(folder / "reward.yaml")

    def test_a_single_stage_does_not_need_the_other_files(self, write):
        folder = write()
        (folder / "sft.yaml").unlink()
        assert list(load_recipe(folder, stages=["ppo"]).stages) == ["ppo"]


class TestOverrides:
    def test_the_command_line_wins_and_the_last_word_counts(self, write):
        folder = write(ppo="beta: 0.1\n")
        assert load_recipe(folder).stages["ppo"].training_args.beta == 0.1
        words = ["--ppo.beta", "0.3", "--ppo.beta=0.5"]
        assert load_recipe(folder, words).stages["ppo"].training_args.beta == 0.5

    def test_for_every_stage_that_has_the_key(self, write):
        recipe = load_recipe(write(), ["--seed", "3", "--num_train_epochs=2"])
        assert [item.training_args.seed for item in recipe.stages.values()] == [3, 3, 3]
        assert [recipe.stages[stage].training_args.num_train_epochs for stage in ("sft", "reward")] == [2, 2]

    def test_a_stage_word_beats_nothing_else(self, write):
        recipe = load_recipe(write(), ["--learning_rate", "1e-4", "--ppo.learning_rate", "1e-5"])
        assert [item.training_args.learning_rate for item in recipe.stages.values()] == [1e-4, 1e-4, 1e-5]

    def test_bare_flags_lists_negative_numbers_and_null(self, write):
        words = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--ppo.max_steps", "-1"]
        recipe = load_recipe(write(), [*words, "--sft.max_length=null"])
        assert recipe.stages["reward"].model_args.use_peft is True
        assert recipe.stages["sft"].model_args.lora_target_modules == ["q_proj", "v_proj"]
        assert recipe.stages["ppo"].training_args.max_steps == 4000
        assert recipe.stages["sft"].training_args.max_length is None

    def test_a_mapping(self, write):
        recipe = load_recipe(write(), ["--sft.lr_scheduler_kwargs", '{"min_lr_rate": 0.2}'])
        assert recipe.stages["sft"].training_args.lr_scheduler_kwargs == {"min_lr_rate": 0.2}

    def test_it_can_repair_a_file(self, write):
        assert load_recipe(write(ppo="beta: -1\n"), ["--ppo.beta", "0"]).stages["ppo"].training_args.beta == 0

    @pytest.mark.parametrize(
        ("words", "problem"),
        [
            (["--sed", "3"], "--sed = '3': is not a setting of any stage of this command; did you mean 'seed'?"),
            (["--ppo.betta", "3"], "--ppo.betta = '3': is not a setting of this stage; did you mean 'beta'?"),
            (["--ppo.pretraining_mix", "0"], "--ppo.pretraining_mix = '0': belongs to sft.yaml"),
            (["--pp.beta", "3"], "--pp.beta: 'pp' is not a stage; choose from sft, reward, ppo"),
            (["--seed"], "--seed = True: needs a value"),
            (["--seed", "x"], "--seed = 'x': must be a whole number"),
            (["beta=3"], "'beta=3': not a setting; write --key value"),
            (["--num_generations", "2"], "--num_generations = '2': is always 1"),
            (["--dataset_name", "x"], "write --sft.dataset_name or --reward.dataset_name or --ppo.dataset_name"),
            (["--output_dir", "x"], "--output_dir = 'x': comes from the command"),
        ],
    )
    def test_problems_name_the_command_line(self, write, words, problem):
        found = the_problem(write(), words)
        assert found.startswith("command line: ") and problem in found

    def test_a_stage_that_is_not_read(self, write):
        found = the_problem(write(), ["--sft.seed", "3"], stages=["ppo"])
        assert found == "command line: --sft.seed = '3': this command reads only stage ppo"

    def test_data_and_models_need_no_stage_where_there_is_one(self, write):
        recipe = load_recipe(write(), ["--dataset_name", "x"], stages=["reward"])
        assert recipe.stages["reward"].data_args.dataset_name == "x"


class TestProblems:
    def test_all_files_at_once_with_file_key_value_rule_and_nearest(self, write):
        folder = write(
            sft="lerning_rate: 3\nnum_train_epochs: many\nseed: 2.5\nlearning_rate: 2e-5\n",
            reward="adam_beta2: 1.5\nlam: 0.9\ndtype: floot32\n",
            ppo="generation_batch_size: 100\noutput_dir: x\nkl_estimator: k2\nbf16: 'yes'\n",
        )
        sft, reward, ppo = (folder / f"{stage}.yaml" for stage in ("sft", "reward", "ppo"))
        assert sorted(problems_of(folder)) == sorted(
            [
                f"{sft}: lerning_rate = 3: is not a setting of this stage; did you mean 'learning_rate'?",
                f"{sft}: num_train_epochs = 'many': must be a number",
                f"{sft}: seed = 2.5: must be a whole number",
                f"{reward}: adam_beta2 = 1.5: must be at least 0 and below 1",
                f"{reward}: lam = 0.9: belongs to ppo.yaml",
                f"{reward}: dtype = 'floot32': must be one of auto, bfloat16, float16, float32; "
                "did you mean 'float32'?",
                f"{ppo}: output_dir = 'x': comes from the command: --output_dir",
                f"{ppo}: kl_estimator = 'k2': must be one of k1, k3",
                f"{ppo}: bf16 = 'yes': must be true or false or null",
                f"{ppo}: generation_batch_size = 100: must be a multiple of the minibatch of 64 episodes: "
                "per_device_train_batch_size 8 x gradient_accumulation_steps 8 x 1 process",
            ]
        )

    @pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
    def test_required_keys(self, write, stage):
        items = problems_of(write(replace={stage: ""}))
        missing = [item.partition(": ")[2] for item in items if "is required and missing" in item]
        expected = ["model_name_or_path", "dataset_name"] if stage == "sft" else ["dataset_name"]
        assert missing == [f"{key}: is required and missing" for key in expected]

    def test_an_empty_required_key(self, write):
        assert "dataset_name: is required" in the_problem(write(replace={"reward": "dataset_name:\n"}))

    @pytest.mark.parametrize(
        ("stage", "lines", "rule"),
        [
            ("sft", "load_in_4bit: true\n", "use_peft = False: must be true with load_in_4bit"),
            (
                "sft",
                "use_peft: true\nload_in_4bit: true\nload_in_8bit: true\n",
                "cannot be combined with load_in_4bit",
            ),
            ("sft", "pretraining_mix: 0.1\n", "must be set when pretraining_mix is above 0"),
            ("sft", "lr_scheduler_type: cosin\n", "did you mean 'cosine'?"),
            ("reward", "streaming: true\n", "max_steps = -1: must be set with streaming"),
            (
                "reward",
                "streaming: true\nmax_steps: 9\ndataloader_num_workers: 2\n",
                "dataloader_num_workers = 2: must be 0 with streaming",
            ),
            ("ppo", "compare_without_ptx: true\nptx_coef: 0\n", "needs ptx_coef above 0"),
            ("ppo", "save_steps: 12\n", "must be a multiple of the 8 optimizer steps"),
            ("ppo", "save_steps: 0.5\n", "must be a multiple of the 8 optimizer steps"),
            ("ppo", "max_steps: 12\n", "max_steps = 12: must be a multiple of the 8 optimizer steps"),
            ("ppo", "total_episodes: 1000\n", "must be a multiple of generation_batch_size (512)"),
            ("ppo", "total_episodes: null\n", "must be set unless max_steps is"),
            ("ppo", "temperature: 0\n", "must be greater than 0"),
            ("ppo", "missing_eos_penalty: 1\nmissing_eos_score: -1\n", "cannot be combined with missing_eos_penalty"),
            ("ppo", "missing_eos_score: .inf\n", "must be a number"),
            ("ppo", "reward_weights: [2.0]\n", "has no meaning with one reward"),
            ("ppo", "reward_model_revision: v1\n", "reward_model_revision = 'v1': has no effect without reward_model"),
            ("reward", "sft_model_revision: v1\n", "sft_model_revision = 'v1': has no effect without sft_model_path"),
            ("ppo", "reward_functions: a:b\n", "must be a list"),
            (
                "ppo",
                "reward_functions: [a:b]\nextra_reward_model_paths: [c, d]\nreward_weights: [1, 2]\n",
                "reward_weights = [1.0, 2.0]: must have 4 values: for the reward model, for each of extra",
            ),
            ("ppo", "model_name_or_path: x\n", "the policy starts from the SFT stage"),
            ("ppo", "num_train_epochs: 2\n", "set total_episodes or max_steps"),
            ("ppo", "warmup_steps: 2\n", "set warmup_iterations"),
            ("ppo", "prompt_template: chat\n", "must be that of sft.yaml, 'raw'"),
            ("reward", "prompt_template: user-asistant\n", "did you mean 'user-assistant'?"),
            ("reward", "prompt_template: 'chat:'\n", "must be one of chat, raw, instruction, user-assistant, chat:<"),
            ("reward", "learning_rate: .inf\n", "must be a number"),
            ("reward", "hub_token: abc\n", "does not belong in a recipe"),
            ("reward", "dataset_name: x\n", "dataset_name: duplicate key, also on line 2"),
            ("reward", "1: 2\n", "1 = 2: a key must be text"),
        ],
    )
    def test_rules(self, write, stage, lines, rule):
        found = the_problem(write(**{stage: lines}))
        assert found.startswith(str(Path("mine") / f"{stage}.yaml")) or f"{stage}.yaml: " in found
        assert rule in found

    def test_ptx_needs_text(self, write):
        found = the_problem(write(replace={"ppo": "dataset_name: x\n"}))
        assert "pretraining_dataset_name = None: must be set when ptx_coef is above 0" in found
        assert (
            load_recipe(write(replace={"ppo": "dataset_name: x\nptx_coef: 0\n"})).stages["ppo"].training_args.ptx_coef
            == 0
        )

    def test_the_number_of_processes_counts(self, write, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "16")
        assert "minibatch of 1024 episodes" in the_problem(write())

    @pytest.mark.parametrize(
        ("text", "problem"),
        [("a: [1", "is not valid YAML"), ("- a\n", "must hold `key: value` lines"), ("just text\n", "holds a str")],
    )
    def test_files_that_are_no_settings(self, write, text, problem):
        assert problem in the_problem(write(replace={"reward": text}))

    def test_missing_file(self, write):
        folder = write()
        (folder / "reward.yaml").rename(folder / "rewards.yaml")
        found = the_problem(folder)
        assert found.startswith(
            f"{folder / 'reward.yaml'}: not found; the folder has ppo.yaml, rewards.yaml, sft.yaml"
        )
        assert found.endswith("ppo.yaml must set reward_functions or reward_model_path")

    def test_what_only_upstream_refuses(self, write):
        found = the_problem(write(sft="load_best_model_at_end: true\n"))
        assert found.startswith("sft.yaml: SFTConfig refuses these settings: ")

    def test_unknown_recipe(self, tmp_path):
        with pytest.raises(InstructGPTError, match="did you mean 'tiny-cpu'"):
            load_recipe("tiny-cpuu")
        with pytest.raises(InstructGPTError, match="not found"):
            load_recipe(tmp_path / "nowhere")
        with pytest.raises(InstructGPTError, match=r"holds none of sft\.yaml"):
            load_recipe(tmp_path)


def test_reserved_keys_are_no_settings():
    for stage in ("sft", "reward", "ppo"):
        assert not {"output_dir", "config", "hub_token"} & set(stage_settings(stage))
    assert not {"num_generations", "lr_scheduler_type", "warmup_steps"} & set(stage_settings("ppo"))


class TestSavingTheBest:
    @pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
    def test_it_is_refused_where_it_would_never_save(self, stage):
        with pytest.raises(InstructGPTError, match="save_strategy = 'best': best saves no checkpoint"):
            load_recipe("tiny-cpu", [f"--{stage}.save_strategy", "best"])

    def test_it_is_taken_with_a_metric(self):
        words = ["--sft.save_strategy", "best", "--sft.eval_strategy", "steps", "--sft.metric_for_best_model", "loss"]
        assert load_recipe("tiny-cpu", words).stages["sft"].training_args.save_strategy == "best"
