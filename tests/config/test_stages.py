"""The dataclasses: the paper's numbers, what the device decides, and the batch arithmetic."""

import dataclasses
import warnings

import pytest
import torch
import trl
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from instructgpt_hf.config.data import PROMPT_TEMPLATES
from instructgpt_hf.config.model import ModelConfig, peft_config, quantization_config
from instructgpt_hf.config.ppo import PPOConfig
from instructgpt_hf.config.settings import stage_classes, stage_settings
from instructgpt_hf.config.training import RewardConfig, SFTConfig
from instructgpt_hf.errors import InstructGPTError

CONFIGS = [SFTConfig, RewardConfig, PPOConfig]


def make(config, tmp_path, **settings):
    return config(output_dir=str(tmp_path / "out"), **settings)


def upstream_of(config):
    return next(base for base in config.__mro__ if base.__module__.startswith("trl."))


def on_device(monkeypatch, cuda, native_bf16):
    """Make torch report a CUDA device of which nothing is ever used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)

    def supported(including_emulation=True):
        return native_bf16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)


class TestPaperDefaults:
    """Numbers of Ouyang et al. 2022, written down here from the paper and not from the code."""

    def test_sft(self, tmp_path):
        config = make(SFTConfig, tmp_path)
        assert config.learning_rate == 9.65e-6  # C.1, 1.3B and 6B
        assert config.num_train_epochs == 16  # C.1
        assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 32  # C.1
        assert (config.lr_scheduler_type, config.lr_scheduler_kwargs) == ("cosine_with_min_lr", {"min_lr_rate": 0.1})
        assert config.warmup_steps == 0  # C.1
        assert (config.adam_beta1, config.adam_beta2) == (0.9, 0.95)  # App C
        assert config.max_length == 2048  # App C
        assert config.residual_dropout is None and config.pretraining_mix == 0
        assert config.completion_only_loss is True

    def test_reward(self, tmp_path):
        config = make(RewardConfig, tmp_path)
        assert config.learning_rate == 9e-6  # C.2
        assert config.num_train_epochs == 1  # C.2
        assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 64  # C.2, prompts
        assert (config.lr_scheduler_type, config.lr_scheduler_kwargs) == ("cosine_with_min_lr", {"min_lr_rate": 0.1})
        assert (config.adam_beta1, config.adam_beta2) == (0.9, 0.95)  # App C
        assert config.center_on_demonstrations is True  # §3.5

    def test_ppo(self, tmp_path):
        config = make(PPOConfig, tmp_path)
        assert config.beta == 0.02  # C.4
        assert config.epsilon == 0.2  # C.4
        assert config.generation_batch_size == 512 and config.minibatch_size == 64  # C.4
        assert config.num_iterations == 1 and config.optimizer_steps_per_iteration == 8  # C.4
        assert config.total_episodes == 256_000 and config.max_steps == 500 * 8  # C.4
        assert config.gamma == 1.0 and config.lam == 0.95  # C.4; lambda is Stiennon et al.'s
        assert config.temperature == 1.0 and config.num_generations == 1  # C.4
        assert config.ema_decay == 0.992  # C.4
        assert config.value_learning_rate == 9e-6  # C.4
        assert config.ptx_coef == 27.8 and config.ptx_episodes_ratio == 8  # C.4
        assert config.warmup_iterations == 10 and config.warmup_start_factor == 0.1  # C.4
        assert (config.adam_beta1, config.adam_beta2) == (0.9, 0.95)  # App C
        assert config.max_prompt_length == 1024 and config.max_completion_length == 1024  # App C
        assert 2.55e-6 <= config.learning_rate <= 8.05e-6  # E.9: the range in which both kinds of PPO are stable
        assert config.lr_scheduler_type == "constant"  # C.4

    @pytest.mark.parametrize("config", CONFIGS)
    def test_every_difference_to_trl_has_a_source(self, config):
        upstream = {item.name: item for item in dataclasses.fields(upstream_of(config))}
        for item in dataclasses.fields(config):
            before = upstream.get(item.name)
            if before is None or (item.default, item.default_factory) != (before.default, before.default_factory):
                assert item.metadata.get("source"), item.name
                assert item.metadata.get("help"), item.name

    @pytest.mark.parametrize("config", CONFIGS)
    def test_our_own_settings_are_explained(self, config):
        upstream = {item.name for item in dataclasses.fields(upstream_of(config))}
        for item in dataclasses.fields(config):
            if item.name not in upstream:
                assert len(item.metadata["help"]) > 10, item.name


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_no_key_belongs_to_two_dataclasses_of_a_stage(stage):
    names = [item.name for owner in stage_classes(stage) for item in dataclasses.fields(owner)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_construction_gives_no_warning_and_no_folder(config, checkpointing, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = make(config, tmp_path, gradient_checkpointing=checkpointing)
        kwargs = make(config, tmp_path, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert made.gradient_checkpointing is checkpointing
    assert kwargs.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert list(tmp_path.iterdir()) == []


class TestPrecision:
    def test_trl_turns_bf16_on_whatever_the_device(self, tmp_path):
        """The trap: without a GPU, TRL's own config asks for bf16, which transformers refuses."""
        if torch.cuda.is_available():
            pytest.skip("needs a machine without CUDA")
        with pytest.raises(ValueError, match="bf16"):
            trl.SFTConfig(output_dir=str(tmp_path))

    @pytest.mark.parametrize("config", CONFIGS)
    def test_cpu_trains_in_float32(self, config, tmp_path, monkeypatch):
        on_device(monkeypatch, cuda=False, native_bf16=False)
        made = make(config, tmp_path)
        assert (made.bf16, made.fp16) == (False, False)

    @pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp16")])
    def test_cuda_uses_what_it_computes_natively(self, native, expected, monkeypatch):
        from instructgpt_hf.config.device import native_precision

        on_device(monkeypatch, cuda=True, native_bf16=native)
        assert native_precision() == expected
        assert native_precision(use_cpu=True) == "fp32"

    @pytest.mark.parametrize(("native", "expected"), [(True, (True, False)), (False, (False, True))])
    def test_the_configs_follow_the_device(self, native, expected, monkeypatch):
        on_device(monkeypatch, cuda=True, native_bf16=native)
        bare = object.__new__(SFTConfig)
        for item in dataclasses.fields(SFTConfig):
            default = item.default if item.default is not dataclasses.MISSING else None
            object.__setattr__(bare, item.name, default)
        bare.settle()
        assert (bare.bf16, bare.fp16) == expected

    def test_what_the_user_sets_stays(self, tmp_path, monkeypatch):
        made = make(SFTConfig, tmp_path, fp16=True)
        assert (made.bf16, made.fp16) == (False, True)
        made = make(SFTConfig, tmp_path, bf16=False)
        assert (made.bf16, made.fp16) == (False, False)


class TestPPOArithmetic:
    def test_lengths_follow_the_batch_sizes(self, tmp_path):
        config = make(
            PPOConfig,
            tmp_path,
            generation_batch_size=24,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            num_iterations=2,
            total_episodes=72,
        )
        assert config.minibatch_size == 6
        assert config.optimizer_steps_per_iteration == 8  # 24 / 6 minibatches, twice
        assert config.max_steps == 24  # 3 iterations
        assert (config.logging_steps, config.save_steps) == (8, 80)
        assert config.steps_per_generation == 8  # micro-batches of 3

    def test_max_steps_wins_over_episodes(self, tmp_path):
        assert make(PPOConfig, tmp_path, max_steps=24).max_steps == 24

    def test_an_odd_batch_of_rollouts_is_fine(self, tmp_path):
        config = make(
            PPOConfig,
            tmp_path,
            generation_batch_size=9,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=1,
            total_episodes=9,
            eval_strategy="steps",
            per_device_eval_batch_size=1,
        )
        assert config.num_generations == 1 and config.optimizer_steps_per_iteration == 3

    def test_a_copy_can_be_made(self, tmp_path):
        config = make(PPOConfig, tmp_path)
        copy = dataclasses.replace(config, ptx_coef=0.0)
        assert copy.ptx_coef == 0 and copy.max_steps == config.max_steps and copy.num_generations == 1

    def test_processes_share_the_minibatch(self, tmp_path, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "3")
        with pytest.raises(InstructGPTError, match=r"192 episodes.*x 3 processes"):
            make(PPOConfig, tmp_path)

    def test_all_problems_at_once(self, tmp_path):
        with pytest.raises(InstructGPTError) as caught:
            make(
                PPOConfig,
                tmp_path,
                gamma=1.5,
                lam=-0.1,
                epsilon=0,
                temperature=0.0,
                beta=-1,
                ema_decay=1.0,
                ptx_coef=-1,
                num_generations=2,
                publish_weights="best",
                generation_batch_size=100,
            )
        message = str(caught.value)
        for key in ("gamma", "lam", "epsilon", "temperature", "beta", "ema_decay", "ptx_coef", "num_generations"):
            assert f"- {key} = " in message
        assert "publish_weights = 'best': must be one of raw, ema" in message
        assert "generation_batch_size = 100: must be a multiple of the minibatch of 64" in message

    @pytest.mark.parametrize(
        ("save_steps", "strategy", "fine"), [(12, "steps", False), (12, "no", True), (16, "steps", True)]
    )
    def test_checkpoints_lie_between_iterations(self, save_steps, strategy, fine, tmp_path):
        if fine:
            assert make(PPOConfig, tmp_path, save_steps=save_steps, save_strategy=strategy).save_steps == save_steps
        else:
            with pytest.raises(InstructGPTError, match="multiple of the 8 optimizer steps"):
                make(PPOConfig, tmp_path, save_steps=save_steps, save_strategy=strategy)

    def test_episodes_fill_iterations(self, tmp_path):
        with pytest.raises(InstructGPTError, match="total_episodes = 1000: must be a multiple"):
            make(PPOConfig, tmp_path, total_episodes=1000)
        with pytest.raises(InstructGPTError, match="must be set unless max_steps is"):
            make(PPOConfig, tmp_path, total_episodes=None)


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (SFTConfig, {"pretraining_mix": 1.0}),
        (SFTConfig, {"residual_dropout": 1.0}),
        (SFTConfig, {"residual_dropout": -0.1}),
        (SFTConfig, {"learning_rate": 0.0}),
        (RewardConfig, {"per_device_train_batch_size": 0}),
        (RewardConfig, {"learning_rate": float("nan")}),
        (RewardConfig, {"learning_rate": float("inf")}),
    ],
)
def test_ranges(config, settings, tmp_path):
    with pytest.raises(InstructGPTError, match=next(iter(settings))):
        make(config, tmp_path, **settings)


def test_another_scheduler_does_not_get_the_cosine_settings(tmp_path):
    assert make(SFTConfig, tmp_path, lr_scheduler_type="linear").lr_scheduler_kwargs is None
    kept = make(SFTConfig, tmp_path, lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs={"num_cycles": 2})
    assert kept.lr_scheduler_kwargs == {"num_cycles": 2}


class TestModel:
    def test_full_fine_tuning_has_no_adapter(self):
        assert peft_config(ModelConfig(), "CAUSAL_LM") is None
        assert quantization_config(ModelConfig()) is None

    def test_adapter_of_a_scorer_saves_its_head(self):
        config = ModelConfig(use_peft=True, lora_r=4, lora_alpha=8)
        policy, scorer = peft_config(config, "CAUSAL_LM"), peft_config(config, "SEQ_CLS")
        assert policy.target_modules == "all-linear" and policy.modules_to_save is None
        assert (policy.r, policy.lora_alpha, policy.lora_dropout) == (4, 8, 0.0)
        assert scorer.modules_to_save == ["score"] and scorer.task_type == "SEQ_CLS"

    @pytest.mark.parametrize(
        ("cuda", "native", "dtype"),
        [(False, False, torch.float32), (True, False, torch.float16), (True, True, torch.bfloat16)],
    )
    def test_four_bit_computes_in_the_native_format(self, cuda, native, dtype, monkeypatch):
        on_device(monkeypatch, cuda, native)
        config = quantization_config(ModelConfig(use_peft=True, load_in_4bit=True))
        assert config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
        assert config.bnb_4bit_compute_dtype == dtype

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ({}, {}),
            ({"use_dora": True}, {"use_dora": True}),
            ({"use_rslora": True}, {"use_rslora": True}),
            ({"lora_target_parameters": ["experts.down_proj"]}, {"target_parameters": ["experts.down_proj"]}),
            (
                {"lora_target_modules": ["q_proj", "v_proj"], "lora_r": 3, "lora_alpha": 7, "lora_dropout": 0.1},
                {"target_modules": {"q_proj", "v_proj"}, "r": 3, "lora_alpha": 7, "lora_dropout": 0.1},
            ),
        ],
        ids=["lora", "dora", "rslora", "parameters", "numbers"],
    )
    @pytest.mark.parametrize(("task", "head"), [("CAUSAL_LM", None), ("SEQ_CLS", ["score"])])
    def test_adapter_in_full(self, given, expected, task, head):
        """Everything that is not named here is PEFT's default."""
        basis = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "bias": "none"}
        expected = LoraConfig(**{**basis, **expected}, task_type=task, modules_to_save=head)
        assert peft_config(ModelConfig(use_peft=True, **given), task) == expected

    def test_modules_that_the_user_saves_join_the_head(self):
        config = ModelConfig(use_peft=True, lora_modules_to_save=["lm_head"], lora_task_type="CAUSAL_LM")
        assert peft_config(config, "SEQ_CLS").modules_to_save == ["lm_head", "score"]
        assert peft_config(config, "CAUSAL_LM").modules_to_save == ["lm_head"]
        assert (config.lora_task_type, config.lora_modules_to_save) == ("CAUSAL_LM", ["lm_head"]), "unchanged"

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
    def test_four_bit_in_full(self, dtype, monkeypatch):
        on_device(monkeypatch, cuda=True, native_bf16=False)
        given = {"bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": False, "bnb_4bit_quant_storage": "float16"}
        made = quantization_config(ModelConfig(use_peft=True, load_in_4bit=True, dtype=dtype, **given))
        expected = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=torch.float16,
            bnb_4bit_quant_type="fp4",
            bnb_4bit_use_double_quant=False,
            bnb_4bit_quant_storage=torch.float16,
        )
        assert made.to_dict() == expected.to_dict()

    def test_eight_bit(self):
        config = quantization_config(ModelConfig(use_peft=True, load_in_8bit=True))
        assert config.load_in_8bit and not config.load_in_4bit
        assert config.to_dict() == BitsAndBytesConfig(load_in_8bit=True).to_dict()


def test_prompt_templates():
    assert PROMPT_TEMPLATES == ("chat", "raw", "instruction", "user-assistant")
    setting = stage_settings("sft")["prompt_template"]
    accepted = [*PROMPT_TEMPLATES, "chat:rag", None]
    assert [setting.violation(value) for value in accepted] == [None] * len(accepted)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"top_p": 0.5}, "top_p = 0.5: would sample from another distribution"),
        ({"repetition_penalty": 1.2}, "repetition_penalty = 1.2: would sample from another"),
        ({"generation_kwargs": {"typical_p": 0.9}}, "typical_p would sample from another distribution .* remove it"),
        ({"generation_kwargs": {"temperature": 0.9}}, "temperature would sample .* set temperature"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha = 5.0: would add noise"),
        ({"normalize_advantages": True}, "set whiten_advantages"),
        ({"lr_scheduler_type": "linear"}, "is fixed: constant after warmup_iterations"),
        ({"warmup_steps": 10}, "set warmup_iterations"),
        ({"num_train_epochs": 2}, "set total_episodes or max_steps"),
        ({"data_seed": 3}, "follows seed"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_ppo_has_no_use_for_is_refused_in_python_too(setting, message, tmp_path):
    with pytest.raises(InstructGPTError, match=message):
        PPOConfig(output_dir=str(tmp_path), **setting)


def test_a_program_may_evaluate(tmp_path):
    PPOConfig(output_dir=str(tmp_path), eval_strategy="steps", eval_steps=8, generation_kwargs={"use_cache": True})


def test_sampling_settings_that_are_switched_off_are_fine(tmp_path):
    off = {"do_sample": True, "top_p": 1.0, "top_k": None, "num_beams": 1, "repetition_penalty": 1.0}
    PPOConfig(output_dir=str(tmp_path), generation_kwargs=off, top_k=0, min_p=0.0)
