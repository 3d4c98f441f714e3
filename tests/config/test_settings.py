"""What stands on a setting's field is all that is needed: queries read it, and nothing else lists settings."""

import dataclasses
from typing import ClassVar

import pytest

from instructgpt_hf.config import rules
from instructgpt_hf.config import settings as queries
from instructgpt_hf.config.data import DataArguments, PPOArguments
from instructgpt_hf.config.fields import Upstream, known_upstream, not_in_recipes, refused, setting, settings_of
from instructgpt_hf.config.parsing import Mismatch, fit
from instructgpt_hf.config.ppo import PPOConfig
from instructgpt_hf.config.ranges import POSITIVE, UNIT
from instructgpt_hf.config.recipe import StageSettings, load_recipe
from instructgpt_hf.config.settings import adjustable_keys, neutral_keys, refusals, stage_classes, stage_settings
from instructgpt_hf.errors import InstructGPTError

STAGES = ["sft", "reward", "ppo"]


@dataclasses.dataclass
class MoreConfig(PPOConfig):
    """The PPO stage with one more setting of each kind, and more that is known about upstream's fields."""

    upstream: ClassVar = {
        "torch_empty_cache_steps": Upstream(POSITIVE, neutral=True),
        "optim_args": not_in_recipes("is not for recipes"),
        "use_cache": refused("would cost memory"),
    }
    sharpness: float = setting(
        0.5, "Sharpness of the made-up loss.", "C.9: half", UNIT, choices=(0.25, 0.5), adjustable=True
    )
    print_every: int | None = setting(None, "Steps between two made-up lines.", "ours", POSITIVE, neutral=True)


class TestOneNewSetting:
    """`sharpness` and `print_every` are declared above and nowhere else."""

    @pytest.fixture
    def stage(self, monkeypatch):
        """The PPO stage with `MoreConfig`."""
        original = stage_classes
        queries.stage_settings.cache_clear(), queries.refusals.cache_clear()
        monkeypatch.setattr(
            queries, "stage_classes", lambda stage: (*original(stage)[:2], MoreConfig if stage == "ppo" else PPOConfig)
        )
        monkeypatch.setattr("instructgpt_hf.config.recipe.stage_classes", queries.stage_classes)
        yield "ppo"
        queries.stage_settings.cache_clear(), queries.refusals.cache_clear()

    def load(self, *words):
        return load_recipe("tiny-cpu", words, stages=["ppo"]).stages["ppo"]

    def test_it_is_coerced_and_reaches_the_config(self, stage):
        settings = self.load("--sharpness", "2.5e-1", "--ppo.print_every=1e2")
        assert settings.training_args.sharpness == 0.25 and settings.training_args.print_every == 100
        assert settings.changed()["sharpness"] == 0.25

    @pytest.mark.parametrize(
        ("words", "rule"),
        [
            (["--sharpness", "much"], "sharpness = 'much': must be a number"),
            (["--sharpness", "1.5"], "sharpness = '1.5': must be between 0 and 1"),
            (["--sharpness", "0.7"], "sharpness = '0.7': must be one of 0.25, 0.5"),
            (["--print_every", "0"], "print_every = '0': must be greater than 0"),
            (["--sharpnes", "0.5"], "did you mean 'sharpness'?"),
            (["--torch_empty_cache_steps", "0"], "must be greater than 0"),
            (["--optim_args", "a"], "optim_args = 'a': is not for recipes"),
        ],
    )
    def test_recipes_check_it(self, stage, words, rule):
        with pytest.raises(InstructGPTError) as caught:
            self.load(*words)
        assert rule in str(caught.value)

    def test_programs_check_it(self, tmp_path):
        assert MoreConfig(output_dir=str(tmp_path), optim_args="a").optim_args == "a"
        with pytest.raises(InstructGPTError) as caught:
            MoreConfig(output_dir=str(tmp_path), sharpness=1.5, print_every=0, use_cache=True, beta=-1.0)
        lines = [line.removeprefix("  - ") for line in str(caught.value).splitlines()[1:]]
        assert sorted(lines) == [
            "beta = -1.0: must be 0 or greater",
            "print_every = 0: must be greater than 0",
            "sharpness = 1.5: must be between 0 and 1",
            "use_cache = True: would cost memory",
        ]

    def test_queries_know_it(self, stage):
        assert neutral_keys(stage) - set(NEUTRAL[stage]) == {"print_every", "torch_empty_cache_steps"}
        assert set(adjustable_keys(stage)) - set(ADJUSTABLE) == {"sharpness"}
        assert refusals(stage)["optim_args"] == "is not for recipes" and "use_cache" not in stage_settings(stage)
        assert self.load().defaults_with_source()["sharpness"] == (0.5, "C.9: half")
        assert "torch_empty_cache_steps" not in self.load().defaults_with_source()


# Names that a fingerprint leaves out. Finished runs keep their fingerprint only while exactly these are neutral.
SHARED = [
    *("dataloader_num_workers", "dataloader_pin_memory", "disable_tqdm", "hub_private_repo", "logging_first_step"),
    *("logging_nan_inf_filter", "logging_steps", "logging_strategy", "project", "push_to_hub", "report_to"),
    *("resume_from_checkpoint", "run_name", "save_steps", "save_strategy", "save_total_limit", "trackio_bucket_id"),
    *("trackio_space_id", "trackio_static_space_id"),
]
NEUTRAL = {
    "sft": SHARED,
    "reward": SHARED,
    "ppo": [
        *("compare_without_ptx", "eval_num_prompts", "log_completions", "log_unique_prompts"),
        *("num_completions_to_print", "stop_kl", *SHARED),
    ],
}
ADJUSTABLE = [
    *("beta", "cliprange_value", "epsilon", "kl_horizon", "kl_target", "learning_rate", "max_grad_norm"),
    *("missing_eos_penalty", "missing_eos_score", "ptx_coef", "reward_clip_range", "value_learning_rate", "vf_coef"),
    "warmup_iterations",
]


@pytest.mark.parametrize("stage", STAGES)
def test_settings_that_a_fingerprint_leaves_out(stage):
    known = set(stage_settings(stage))
    later = {key for key in SHARED if key not in known}
    assert all(key.startswith("trackio_") for key in later), "older versions of transformers lack some of these"
    assert neutral_keys(stage) == set(NEUTRAL[stage]) - later


def test_settings_that_may_change_after_a_stop():
    assert adjustable_keys("ppo") == tuple(ADJUSTABLE)
    assert adjustable_keys("sft") == adjustable_keys("reward") == ()
    fields = {item.name for item in dataclasses.fields(PPOConfig)}
    assert set(ADJUSTABLE) <= fields, "a checkpoint's note reads them from the training settings"


def test_what_is_known_about_upstream_names_its_fields():
    """A misspelt name would be ignored."""
    fields = {item.name for stage in STAGES for owner in stage_classes(stage) for item in dataclasses.fields(owner)}
    named = {key for stage in STAGES for owner in stage_classes(stage) for key in known_upstream(owner)}
    assert {key for key in named if not key.endswith("*")} - fields == {"config"}


@pytest.mark.parametrize("stage", STAGES)
def test_rules_read_settings(stage):
    """A rule that reads a misspelt setting would never apply."""
    known = {*stage_settings(stage), "reward_stage"}  # the last one is no setting, but what files a recipe has
    assert {key for keys, _ in rules._RULES[stage] for key in keys} <= known


def test_exact_names_win_over_patterns_and_subclasses_over_bases():
    known = settings_of(PPOConfig)
    assert known["logging_steps"].neutral and known["logging_steps"].valid is POSITIVE
    assert known["logging_first_step"].neutral and known["logging_first_step"].valid is None
    assert known["max_grad_norm"].adjustable and not settings_of(stage_classes("sft")[2])["max_grad_norm"].adjustable


def test_a_value_that_is_not_set_breaks_no_rule():
    item = settings_of(MoreConfig)["print_every"]
    assert item.violation(None) is None and fit(item, "null", from_shell=True) is None
    with pytest.raises(Mismatch, match="needs a value"):
        fit(item, True, from_shell=True)


def test_every_range_accepts_the_default():
    for stage in STAGES:
        for key, item in stage_settings(stage).items():
            assert item.violation(item.default) is None, key


def test_settings_of_a_stage_have_their_classes():
    settings = load_recipe("tiny-cpu", stages=["ppo"]).stages["ppo"]
    assert isinstance(settings, StageSettings)
    assert isinstance(settings.data_args, PPOArguments) and isinstance(settings.data_args, DataArguments)
    assert isinstance(settings.training_args, PPOConfig)
