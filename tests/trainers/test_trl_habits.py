"""SFT and reward trainer as people who know TRL write them: names or objects, raw rows, no tokenizer, no format."""

import logging

import pytest
import torch
import trl
from datasets import Dataset, DatasetDict
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

import instructgpt_hf
from instructgpt_hf import InstructGPTError, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer, load_reward_model
from instructgpt_hf.data.rankings.rows import ranking_rows, tokenize_rankings
from instructgpt_hf.lab import base_model_path
from instructgpt_hf.models.scoring import score_token_lists

QUICK = dict(use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no", max_steps=2, logging_steps=1)
QUESTION, GOOD, BAD = "Where is the fox?", "The fox is in the forest.", "A fox?"
TURNS = [{"role": "user", "content": QUESTION}]


def said(text):
    return [{"role": "assistant", "content": text}]


DEMONSTRATIONS = {
    "prompt-completion": {"prompt": QUESTION, "completion": GOOD},
    "conversational": {"prompt": TURNS, "completion": said(GOOD)},
    "messages": {"messages": TURNS + said(GOOD)},
}
RANKINGS = {
    "ours": {"prompt": QUESTION, "completions": [GOOD, BAD, "No."], "ranks": [1, 2, 3]},
    "pairs": {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
    "implicit": {"chosen": TURNS + said(GOOD), "rejected": TURNS + said(BAD)},
    "conversational": {"prompt": TURNS, "chosen": said(GOOD), "rejected": said(BAD)},
}


def rows(row, count=4):
    return Dataset.from_list([row] * count)


def sft(folder, data=None, model="lab", settings=(), **more):
    return SFTTrainer(
        model,
        SFTConfig(str(folder), **{**QUICK, **dict(settings)}),
        train_dataset=data or rows(DEMONSTRATIONS["messages"]),
        **more,
    )


def reward(folder, data=None, model="lab", settings=(), **more):
    return RewardTrainer(
        model,
        RewardConfig(str(folder), **{**QUICK, **dict(settings)}),
        train_dataset=data or rows(RANKINGS["pairs"]),
        **more,
    )


TRAINERS = pytest.mark.parametrize("make", [sft, reward])
LORA = LoraConfig(r=4, target_modules="all-linear")


@pytest.mark.parametrize("form", DEMONSTRATIONS)
def test_demonstrations_are_tokenized_inside(tmp_path, form):
    """Ids are those of the format; the loss is on the completion and its EOS."""
    trainer = sft(tmp_path, rows(DEMONSTRATIONS[form]), eval_dataset=rows(DEMONSTRATIONS[form], 2))
    row, tokenizer = trainer.train_dataset[0], trainer.processing_class
    assert tokenizer.decode(row["input_ids"]) == f"{QUESTION}{GOOD}{tokenizer.eos_token}"
    assert tokenizer.decode([item for item in row["labels"] if item != -100]) == f"{GOOD}{tokenizer.eos_token}"
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("form", RANKINGS)
def test_rankings_are_tokenized_inside(tmp_path, form):
    trainer = reward(tmp_path, rows(RANKINGS[form]), eval_dataset=rows(RANKINGS[form], 2))
    row, tokenizer = trainer.train_dataset[0], trainer.processing_class
    assert tokenizer.decode(row["prompt_ids"]) == QUESTION
    texts = [tokenizer.decode(ids) for ids in row["completion_ids"]]
    assert texts[:2] == [f"{GOOD}{tokenizer.eos_token}", f"{BAD}{tokenizer.eos_token}"]
    assert row["ranks"] == list(range(1, len(texts) + 1))
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


@TRAINERS
def test_default_format_is_the_chat_template(tmp_path, make):
    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    trainer = make(tmp_path, processing_class=tokenizer)
    row = trainer.train_dataset[0]
    ids = row["prompt_ids"] + row["completion_ids"][0] if make is reward else row["input_ids"]
    expected = tokenizer.apply_chat_template(TURNS + said(GOOD), tokenize=False)
    assert tokenizer.decode(ids) == expected and trainer.prompt_format.name == "chat"
    named = make(tmp_path, processing_class=tokenizer, prompt_format="instruction")
    assert named.prompt_format.name == "instruction"


@TRAINERS
@pytest.mark.parametrize("padding", [None, "eos"])
def test_padding_differs_from_eos(tmp_path, make, padding):
    """`tokenizer.pad_token = tokenizer.eos_token`, as scripts write it, would move a reward model's score."""
    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    tokenizer.pad_token = None if padding is None else tokenizer.eos_token
    trainer = make(tmp_path, processing_class=tokenizer)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert trainer.model.config.pad_token_id == tokenizer.pad_token_id
    trainer.train()


@TRAINERS
def test_model_in_memory_finds_its_tokenizer(tmp_path, make):
    kind = AutoModelForSequenceClassification if make is reward else AutoModelForCausalLM
    options = {"num_labels": 1} if make is reward else {}
    trainer = make(tmp_path, model=kind.from_pretrained(base_model_path(), **options))
    trainer.train()
    assert trainer.processing_class.eos_token is not None


def test_model_made_from_a_config_needs_a_tokenizer(tmp_path, make_policy, make_scorer):
    for make, model in ((sft, make_policy()), (reward, make_scorer())):
        with pytest.raises(InstructGPTError, match=r"processing_class: .*pass the tokenizer"):
            make(tmp_path, model=model)


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["whole", "lora"])
def test_sft_model_is_loaded_by_plain_transformers(tmp_path, peft_config):
    trainer = sft(tmp_path, peft_config=peft_config)
    trainer.train()
    trainer.save_model(tmp_path / "model")
    kind = AutoModelForCausalLM if peft_config is None else AutoPeftModelForCausalLM
    model = kind.from_pretrained(tmp_path / "model")
    ids = torch.tensor([trainer.train_dataset[0]["input_ids"]])
    torch.testing.assert_close(model(ids).logits, trainer.model(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").pad_token == trainer.processing_class.pad_token
    again = sft(tmp_path, model=str(tmp_path / "model"))  # whole or adapter, it is trained further
    again.train()
    assert hasattr(again.model, "peft_config") == (peft_config is not None)


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["whole", "lora"])
def test_reward_model_is_loaded_as_it_was_trained(tmp_path, peft_config):
    trainer = reward(tmp_path, peft_config=peft_config, settings={"learning_rate": 1e-2})
    head = trainer.scorer.classifier.score.weight.detach().clone()
    trainer.train()
    assert not torch.equal(trainer.scorer.classifier.score.weight, head)
    trainer.save_model(tmp_path / "model")
    output = trainer.predict(rows(RANKINGS["ours"]))
    model = load_reward_model(tmp_path / "model")
    reader = trainer.reader.whole_rankings(rows(RANKINGS["ours"]), "rankings")
    for row, scores, ranks in zip(reader, output.predictions, output.label_ids, strict=True):
        sequences = [row["prompt_ids"] + ids for ids in row["completion_ids"]]
        assert scores == pytest.approx(score_token_lists(model, sequences, trainer.processing_class.pad_token_id, 3))
        assert ranks == [1, 2, 3]
    plain = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", **({} if peft_config is None else {"config": model.get_base_model().config})
    )
    assert plain(torch.tensor([sequences[0]])).logits.item() == pytest.approx(scores[0], abs=1e-5)
    again = reward(tmp_path, model=str(tmp_path / "model"))  # trained further, with its head
    assert torch.equal(again.scorer.classifier.score.weight.cpu(), trainer.scorer.classifier.score.weight)
    again.train()


def test_predictions_follow_the_rows(tmp_path):
    """Nothing is left out, and the order is the dataset's, although batches are sorted by length; the shift acts."""
    texts = ["w " * length for length in (9, 1, 30, 4, 17)]
    data = Dataset.from_list(
        [
            {"prompt": QUESTION * (i + 1), "completions": [text, BAD], "ranks": [1, 1 + i % 2]}
            for i, text in enumerate(texts)
        ]
    )
    trainer = reward(tmp_path, settings={"max_tokens_per_forward": 64, "per_device_eval_batch_size": 5})
    trainer.scorer.classifier.config.reward_shift = 3.0
    output = trainer.predict(data)
    for row, scores in zip(trainer.reader.whole_rankings(data, "data"), output.predictions, strict=True):
        sequences = [row["prompt_ids"] + ids for ids in row["completion_ids"]]
        assert scores == pytest.approx(score_token_lists(trainer.model, sequences, 0, 1), abs=1e-4)
    assert output.label_ids == [row["ranks"] for row in data]
    assert output.metrics["test_loss"] > 0
    tied = trainer.predict(data.select([0]))
    assert len(tied.predictions[0]) == 2 and "test_accuracy" not in tied.metrics


def test_prediction_refuses_what_the_model_cannot_read(tmp_path):
    trainer = reward(tmp_path, settings={"max_length": 24})
    data = Dataset.from_list([RANKINGS["pairs"], {**RANKINGS["pairs"], "chosen": GOOD * 9}])
    with pytest.raises(InstructGPTError, match=r"row 1: \d+ tokens, and max_length .* are 24") as error:
        trainer.predict(data)
    assert "row 0" not in str(error.value)
    with pytest.raises(InstructGPTError, match="row 1: needs text and rank"):
        trainer.predict(
            Dataset.from_list([RANKINGS["pairs"], {**RANKINGS["pairs"], "chosen": ""}] + [RANKINGS["pairs"]] * 98)
        )
    with pytest.raises(InstructGPTError, match="is a stream"):
        trainer.predict(data.to_iterable_dataset())


def test_counts_of_a_stream_are_those_of_one_reading(tmp_path):
    """Finding out that rows are tokenized must not read them, because reading counts what is left out."""
    trainer = reward(tmp_path)
    tied = {"prompt": QUESTION, "completions": [GOOD, BAD], "ranks": [1, 1]}
    stream = ranking_rows(Dataset.from_list([tied, RANKINGS["ours"]]).to_iterable_dataset(), "rankings")
    rows, counts, _ = tokenize_rankings(stream, trainer.prompt_format, trainer.processing_class, 2048, "rankings")
    assert trainer.reader.rankings(rows, "rankings") is rows
    assert len(list(rows)) == 1 and counts["dropped_ties"] == 1


@TRAINERS
def test_several_datasets_are_evaluated_by_name(tmp_path, make):
    row = RANKINGS["pairs"] if make is reward else DEMONSTRATIONS["messages"]
    measured = []

    def compute_metrics(result):
        measured.append(len(result.predictions))
        return {"own": 0.5}

    trainer = make(
        tmp_path,
        eval_dataset={"first": rows(row, 3), "second": rows(row, 2)},
        compute_metrics=compute_metrics,
        settings={"eval_strategy": "steps", "eval_steps": 1},
    )
    trainer.train()
    logged = {name for record in trainer.state.log_history for name in record}
    assert {"eval_first_loss", "eval_second_loss", "eval_first_own", "eval_second_own"} <= logged
    assert measured == [3, 2, 3, 2]
    assert trainer.evaluate(rows(row, 1))["eval_own"] == 0.5 and measured[-1] == 1


@TRAINERS
def test_callbacks_and_settings_by_default(tmp_path, make, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    trainer = make(tmp_path, callbacks=[Watch()])
    trainer.train()
    assert seen == [1, 2]
    kind, data = (RewardTrainer, RANKINGS["pairs"]) if make is reward else (SFTTrainer, DEMONSTRATIONS["messages"])
    plain = kind("lab", train_dataset=rows(data))
    assert plain.args.output_dir == ("lab-Reward" if make is reward else "lab-SFT")


@TRAINERS
def test_push_is_private_and_loads_alone(tmp_path, make, hub):
    trainer = make(tmp_path / "run", peft_config=LORA, settings={"push_to_hub": True})
    trainer.push_to_hub()
    ((folder, _),) = hub.uploads
    assert hub.private is True and not (tmp_path / "run" / "model_card.md").exists()
    if make is reward:
        load_reward_model(folder)
    else:
        AutoPeftModelForCausalLM.from_pretrained(folder)


@TRAINERS
def test_metrics_go_where_report_to_says(tmp_path, make):
    pytest.importorskip("tensorboard")
    trainer = make(tmp_path, settings={"report_to": "tensorboard"})
    trainer.train()
    assert list(tmp_path.rglob("events.out.tfevents*"))


@TRAINERS
def test_columns_are_checked_at_construction(tmp_path, make, monkeypatch):
    """Before weights are loaded; the error names the columns seen and those accepted."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", None)
    with pytest.raises(InstructGPTError) as error:
        make(tmp_path, rows({"question": QUESTION, "verdict": GOOD}))
    message = str(error.value)
    assert message.startswith("train_dataset: ") and "'question'" in message and "'verdict'" in message
    assert "completion" in message
    with pytest.raises(InstructGPTError, match=r"eval_dataset\['held'\]: "):
        make(tmp_path, eval_dataset={"held": rows({"question": QUESTION})})


@TRAINERS
def test_what_is_no_dataset_is_refused(tmp_path, make):
    for data, rule in (
        ([{"prompt": QUESTION}], r"is a list, .*Dataset.from_list"),
        (
            DatasetDict(train=rows({"prompt": QUESTION}), test=rows({"prompt": QUESTION})),
            r"holds .*'train', 'test'.*\['train'\]",
        ),
        (Dataset.from_dict({"prompt": []}), "has no rows"),
    ):
        with pytest.raises(InstructGPTError, match=f"train_dataset: {rule}"):
            make(tmp_path, data) if len(data) else (SFTTrainer if make is sft else RewardTrainer)(
                "lab", train_dataset=data
            )


@TRAINERS
def test_settings_of_another_trainer_are_refused(tmp_path, make):
    kind, own = (RewardTrainer, trl.RewardConfig) if make is reward else (SFTTrainer, trl.SFTConfig)
    with pytest.raises(InstructGPTError, match=rf"args: is a trl {own.__name__}.*instructgpt_hf.{own.__name__}"):
        kind("lab", own(str(tmp_path), use_cpu=True, bf16=False), train_dataset=rows({}))


@TRAINERS
def test_second_adapter_is_refused(tmp_path, make):
    make(tmp_path, peft_config=LORA).save_model(tmp_path / "adapter")
    with pytest.raises(InstructGPTError, match="peft_config: the model has an adapter already"):
        make(tmp_path, model=str(tmp_path / "adapter"), peft_config=LORA)
    assert LORA.task_type is None and LORA.modules_to_save is None  # the user's config is not changed


def test_models_of_the_other_kind_are_refused(tmp_path, make_policy, make_scorer, tokenizer):
    with pytest.raises(InstructGPTError, match="LlamaForSequenceClassification is no causal language model"):
        sft(tmp_path, model=make_scorer(), processing_class=tokenizer)
    with pytest.raises(InstructGPTError, match=r"LlamaForCausalLM is no sequence classifier .*num_labels=1"):
        reward(tmp_path, model=make_policy(), processing_class=tokenizer)


def test_arguments_without_effect_are_refused(tmp_path):
    with pytest.raises(InstructGPTError, match="formatting_func: apply it before"):
        sft(tmp_path, formatting_func=str)
    with pytest.raises(InstructGPTError, match="data_collator: is the trainer's own"):
        reward(tmp_path, data_collator=list)
    with pytest.raises(InstructGPTError, match="preprocess_logits_for_metrics: there are no logits"):
        reward(tmp_path, preprocess_logits_for_metrics=max)
    with pytest.raises(InstructGPTError, match="quantization_config: the model is loaded already"):
        sft(tmp_path, model=AutoModelForCausalLM.from_pretrained(base_model_path()), quantization_config=object())


def test_settings_without_effect_are_refused(tmp_path):
    """TRL would apply them after the rows are tokenized, or not at all."""
    for name, value in (("assistant_only_loss", True), ("completion_only_loss", False), ("eos_token", "<eos>")):
        with pytest.raises(InstructGPTError, match=f"{name} = .*has no effect"):
            sft(tmp_path, settings={name: value})
    assert sft(tmp_path, settings={"completion_only_loss": None}).train_dataset


def test_pretraining_text_is_mixed_in(tmp_path):
    settings = {"pretraining_mix": 0.5, "max_length": 32}
    text = Dataset.from_dict({"text": ["The fox is a red animal."] * 20})
    mixed = sft(tmp_path, settings=settings, pretraining_dataset=text).train_dataset
    assert len(mixed) == 8 and sum(-100 not in row["labels"] for row in mixed) == 4
    with pytest.raises(InstructGPTError, match=r"pretraining_mix = 0\.5: needs pretraining_dataset"):
        sft(tmp_path, settings=settings)


def test_long_rows_are_left_out_and_counted(tmp_path, caplog):
    data = Dataset.from_list([{"prompt": QUESTION, "completion": GOOD * times} for times in (1, 1, 9)])
    with caplog.at_level(logging.WARNING):
        trainer = sft(tmp_path, data, settings={"max_length": 40})
    assert len(trainer.train_dataset) == 2
    assert "train_dataset: left out 1 demonstrations over max_length." in caplog.text


def test_residual_dropout_acts_on_a_model_that_is_loaded_here(tmp_path, make_policy, tokenizer, caplog):
    folder = tmp_path / "gpt2"
    make_policy("gpt2").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data = rows({"prompt": "a b", "completion": "c"})
    trainer = sft(tmp_path, data, model=str(folder), settings={"residual_dropout": 0.2})
    assert trainer.model.transformer.h[0].mlp.dropout.p == 0.2
    trainer.save_model(tmp_path / "model")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model").config
    assert saved.resid_pdrop == make_policy("gpt2").config.resid_pdrop != 0.2
    with pytest.raises(InstructGPTError, match=r"residual_dropout = 0\.2: the model is in memory with resid_pdrop"):
        sft(tmp_path, data, model=make_policy("gpt2"), settings={"residual_dropout": 0.2}, processing_class=tokenizer)
    with caplog.at_level(logging.WARNING):
        sft(tmp_path, settings={"residual_dropout": 0.2})
    assert "residual_dropout = 0.2 has no effect: llama" in caplog.text


def test_tokenized_rows_stay_as_they_are(tmp_path):
    data = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 4, "labels": [[-100, 6, 7]] * 4})
    assert sft(tmp_path, data).train_dataset[0]["input_ids"] == [5, 6, 7]
    data = rows({"prompt_ids": [5], "completion_ids": [[6, 1], [7, 1]], "ranks": [1, 2]})
    assert reward(tmp_path, data).train_dataset[0]["completion_ids"] == [[6, 1], [7, 1]]


@TRAINERS
def test_saved_tokenizer_renders_as_the_training_did(tmp_path, make):
    """Also for a plain format, so that the next trainer and `pipeline` need not be told."""
    trainer = make(tmp_path, prompt_format="instruction")
    trainer.save_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=False)
    assert ids == trainer.prompt_format.prompt_ids(QUESTION, trainer.processing_class)
    again = make(tmp_path, model=str(tmp_path / "model"))
    assert again.train_dataset[:] == trainer.train_dataset[:]


def test_names_are_public():
    for name in (
        "SFTTrainer",
        "RewardTrainer",
        "PPOTrainer",
        "SFTConfig",
        "RewardConfig",
        "PPOConfig",
        "PromptFormat",
    ):
        assert name in instructgpt_hf.__all__
