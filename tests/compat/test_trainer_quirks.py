"""Behaviour of the trainers of TRL and transformers that `instructgpt_hf._compat` works around."""

from __future__ import annotations

import contextlib
import copy
import inspect
import types
import warnings
from pathlib import Path

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from helpers.tiny_models import tiny_config
from helpers.upstream import OLD_CHECKPOINTING, caught, quantised, tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from trl import RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from instructgpt_hf._compat import peft, quirks
from instructgpt_hf._compat.checkpoints import WholeCheckpoints

IDS = torch.tensor([[3, 4, 5, 6]])


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory):
    """A plain trl.SFTTrainer after one step, and the folders that it wrote its checkpoint's parts into."""
    folder, written = tmp_path_factory.mktemp("plain"), []

    class Plain(SFTTrainer):
        def _save_rng_state(self, output_dir):
            written.append(Path(output_dir))
            super()._save_rng_state(output_dir)

    trainer = sft_trainer(Plain, tiny(), tokenizer, folder, max_steps=1, save_steps=1)
    trainer.train()
    return trainer, folder, written


@pytest.fixture
def rloo(tokenizer, tmp_path):
    """A config of RLOOTrainer with a KL penalty, and a function that builds the trainer of a policy with it."""
    args = RLOOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], beta=0.1, num_generations=2,
        per_device_train_batch_size=2,
    )  # fmt: skip
    prompts = Dataset.from_dict({"prompt": ["a", "b"]})

    def build(policy):
        return RLOOTrainer(policy, len, args, train_dataset=prompts, processing_class=tokenizer)

    return types.SimpleNamespace(args=args, build=build)


def sft_trainer(kind, model, tokenizer, folder, **settings):
    args = SFTConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, **settings)
    data = Dataset.from_dict({"input_ids": [[3, 4, 5]]})
    return kind(model, args, train_dataset=data, processing_class=tokenizer)


class TestTrainers:
    def test_a_checkpoint_is_written_under_its_final_name(self, trained, tokenizer, tmp_path):
        """`WholeCheckpoints`: a killed process leaves a folder that counts as a checkpoint."""
        _, folder, written = trained
        assert written == [folder / "checkpoint-1"]
        (tmp_path / "checkpoint-7").mkdir()
        assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-7")

        class Whole(WholeCheckpoints, SFTTrainer):
            def _save_rng_state(self, output_dir):
                written.append(Path(output_dir))

        trainer = sft_trainer(Whole, tiny(), tokenizer, tmp_path / "whole", max_steps=1, save_steps=1)
        trainer.train()
        assert written[-1] == tmp_path / "whole" / Whole.UNFINISHED / "checkpoint-1" and not written[-1].exists()
        assert (tmp_path / "whole" / "checkpoint-1" / "trainer_state.json").is_file()

    def test_trl_writes_a_model_card_into_every_checkpoint(self, trained):
        """`CommonChanges.create_model_card`."""
        assert list(trained[1].rglob("README.md"))

    def test_a_repository_is_not_private_by_itself(self, trained, monkeypatch):
        """`CommonChanges.init_hf_repo`."""
        seen = []

        class Api:
            def create_repo(self, name, **options):
                seen.append(options["private"])
                raise InterruptedError

        monkeypatch.setattr(transformers.trainer, "hf_api", Api)
        with pytest.raises(InterruptedError):
            trained[0].init_hf_repo()
        assert seen == [None]

    def test_gradients_are_synchronised_as_the_gradient_state_says(self, trained):
        """`SeveralBackwards`."""
        accelerator = trained[0].accelerator
        for value in (False, True):
            accelerator.gradient_state._set_sync_gradients(value)
            assert accelerator.sync_gradients is value

    def test_trl_prepares_pairs_itself(self, tokenizer, tmp_path):
        """`RankingTrainer`: a dataset of token ids with K completions is not one that RewardTrainer takes."""
        args = RewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True)
        rows = Dataset.from_list([{"prompt_ids": [3], "completion_ids": [[4], [5]], "ranks": [1, 2]}])
        model = AutoModelForSequenceClassification.from_config(tiny_config(num_labels=1))
        with pytest.raises((KeyError, ValueError)):
            RewardTrainer(model, args, train_dataset=rows, processing_class=tokenizer)

    def test_rloo_needs_two_completions_of_a_prompt(self, tmp_path):
        """`whole_batch_group`."""
        settings = dict(output_dir=str(tmp_path), use_cpu=True, bf16=False, generation_batch_size=8)
        with pytest.raises(ValueError, match="at least 2 generations per prompt"):
            RLOOConfig(**settings, num_generations=1)
        config = RLOOConfig(**settings, num_generations=2)
        quirks.whole_batch_group(config)
        assert RLOOConfig(**settings, num_generations=config.num_generations).num_generations == 8

    @pytest.mark.parametrize("loads", [True, False])
    def test_rloo_loads_its_reference_from_the_policys_source(self, rloo, make_policy, loads):
        """`no_reference_from_disk`."""
        with (
            contextlib.nullcontext() if loads else quirks.no_reference_from_disk(rloo.args),
            pytest.raises(OSError) if loads else contextlib.nullcontext(),
        ):
            assert rloo.build(make_policy()).ref_model is None
        assert rloo.args.beta == 0.1

    def test_rloo_adds_a_copy_of_the_policys_adapter(self, rloo, make_policy):
        """`freeze_reference_adapter`."""
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        policy = get_peft_model(make_policy(), config)
        with quirks.no_reference_from_disk(rloo.args):
            rloo.build(policy)
        copies = {name: item for name, item in policy.named_parameters() if ".ref." in name}
        starts = {name: policy.get_parameter(name.replace(".ref.", ".default.")) for name in copies}
        assert copies and all(torch.equal(item, starts[name]) for name, item in copies.items())
        for item in copies.values():
            item.data.zero_()
        peft.freeze_reference_adapter(policy)
        assert all(item.any() and not item.requires_grad for item in copies.values())

    def test_reward_functions_never_receive_the_column_completion(self, rloo, make_policy):
        """`pass_completion_column`: TRL drops it, and passes a column of any other name."""
        received = {}

        def function(completions, **columns):
            received.update(columns)
            return [0.0] * len(completions)

        with quirks.no_reference_from_disk(rloo.args):
            trainer = rloo.build(make_policy())
        trainer.reward_funcs, rows = [function], [{"prompt": "a", "completion": "x", "other": "y"}]
        for inputs in (rows, quirks.pass_completion_column(rows)):
            trainer._calculate_rewards(inputs, ["a"], ["b"], [[3]])
            assert "completion" not in received and received["other"] == ["y"]
        assert received[quirks.COMPLETION_COLUMN] == ["x"]

    def test_rloo_has_private_hooks_only(self):
        """`OnPolicyTrainer`: a base class with public ones would make it unnecessary."""
        assert not hasattr(trl, "OnPolicyTrainer") and not hasattr(trl, "PPOTrainer")

    def test_trl_rounds_the_policy_for_continuous_batching(self):
        """`OnPolicyTrainer._generate_single_turn`."""
        assert "unwrapped_model.to(torch.bfloat16)" in inspect.getsource(RLOOTrainer._generate_single_turn)

    def test_several_gpus_in_a_process_mean_data_parallel(self, trained):
        """`use_one_device`."""
        trainer, model = copy.copy(trained[0]), torch.nn.Linear(2, 2)
        trainer.args = copy.copy(trainer.args)
        trainer.args._n_gpu = 2
        assert isinstance(Trainer._wrap_model(trainer, model), torch.nn.DataParallel)
        quirks.use_one_device(trainer.args)
        assert trainer.args.n_gpu == 1 and Trainer._wrap_model(trainer, model) is model

    @OLD_CHECKPOINTING
    def test_the_old_names_of_checkpointing_are_deprecated(self, tmp_path, make_policy):
        """`settle_checkpointing_names` and `enable_checkpointing`."""

        class Settled(TrainingArguments):
            def __post_init__(self):
                quirks.settle_checkpointing_names(self)
                super().__post_init__()

        def deprecations(kind):
            return [
                text
                for text in caught(lambda: kind(str(tmp_path), gradient_checkpointing=True, use_cpu=True))
                if "deprecated" in text
            ]

        assert deprecations(TrainingArguments) and not deprecations(Settled)
        model = make_policy()
        assert any("deprecated" in text for text in caught(model.gradient_checkpointing_enable))
        for settings in ({"use_reentrant": False}, {"use_reentrant": True}):
            model = make_policy()
            assert not caught(lambda model=model, settings=settings: quirks.enable_checkpointing(model, settings))
            assert model.model.layers[0].gradient_checkpointing

    @pytest.mark.parametrize("kept", [False, True])
    def test_trl_rounds_the_trained_weights_of_a_quantised_model(self, tokenizer, tmp_path, kept):
        """`keep_trained_weights`."""
        model = get_peft_model(
            quantised(tmp_path / "base"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        )
        before = {name: item.detach().clone() for name, item in model.named_parameters() if item.requires_grad}
        with quirks.keep_trained_weights(model) if kept else warnings.catch_warnings():
            sft_trainer(SFTTrainer, model, tokenizer, tmp_path)
        after = {name: item for name, item in model.named_parameters() if item.requires_grad}
        assert {item.dtype for item in after.values()} == {torch.float32 if kept else torch.bfloat16}
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], item) for name, item in before.items()) is kept

    def test_a_copy_of_a_trained_model_runs_the_originals_weights(self, make_policy):
        """`use_own_forward`."""
        model = make_policy()
        add_fused_lm_head(model)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for item in twin.parameters():
                item.zero_()
            assert twin(IDS).logits.any()
            quirks.use_own_forward(twin)
            assert not twin(IDS).logits.any()


def test_no_display_of_the_trainers_is_left_in_a_notebook(tmp_path, monkeypatch):
    """In a notebook the Trainer adds a display that is no subclass of its bar."""
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers import trainer as module

    class NotebookDisplay(TrainerCallback):
        pass

    monkeypatch.setattr(module, "DEFAULT_PROGRESS_CALLBACK", NotebookDisplay)
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = Trainer(torch.nn.Linear(1, 1), arguments, train_dataset=[{}])
    shown = {type(callback) for callback in trainer.callback_handler.callbacks}
    assert NotebookDisplay in shown
    quirks.remove_progress_displays(trainer)
    left = {type(callback) for callback in trainer.callback_handler.callbacks}
    assert shown - left == {NotebookDisplay}
