"""Stage 1's trainer: the loss of the completion's tokens, and steps that do not depend on how a batch is split."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from instructgpt_hf.config.training import SFTConfig
from instructgpt_hf.data.demonstrations import tokenize_demonstrations
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.trainers.sft import SFTTrainer

TEXTS = [("a b c", "d"), ("e", "f g h i j"), ("k l", "m n"), ("o p q r", "s t u")]


@pytest.fixture
def rows(tokenizer):
    data = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in TEXTS])
    return tokenize_demonstrations(data, PromptFormat.create("raw", tokenizer), tokenizer, 32, "demonstrations")[0]


@pytest.fixture
def trainer(tokenizer, rows, tmp_path):
    """A trainer that takes one step over all four demonstrations."""

    def build(model, batch=4, accumulation=1, **changes):
        settings = dict(
            output_dir=str(tmp_path / "work"),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            max_steps=1,
            optim="sgd",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        args = SFTConfig(**{**settings, **changes})
        return SFTTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)

    return build


def weights(model):
    return {name: item.detach().clone() for name, item in model.named_parameters()}


def completion_loss(model, rows):
    """Mean over all completion tokens of -log p(token | before), one unpadded sequence at a time."""
    losses = []
    for row in rows:
        ids, start = row["input_ids"], row["labels"].count(-100)
        logps = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
        losses += [-logps[place - 1, ids[place]] for place in range(start, len(ids))]
    return torch.stack(losses).mean()


def test_loss_is_that_of_completion_tokens(make_policy, rows, trainer):
    model = make_policy()
    expected = completion_loss(copy.deepcopy(model), rows).item()
    made = trainer(model)
    assert made.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    made.train()
    logged = next(record["loss"] for record in made.state.log_history if "loss" in record)
    assert logged == pytest.approx(expected, rel=1e-4)


def completion_accuracy(model, rows):
    """Share of completion tokens that are the model's first choice, one unpadded sequence at a time."""
    hits = []
    for row in rows:
        ids, start = row["input_ids"], row["labels"].count(-100)
        best = model(torch.tensor([ids])).logits[0].argmax(-1)
        hits += [int(best[place - 1]) == ids[place] for place in range(start, len(ids))]
    return sum(hits) / len(hits)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_evaluation_is_a_mean_over_tokens(make_policy, rows, trainer, batch):
    """Whatever the batches, whose token counts differ; also in the log."""
    made = trainer(make_policy(), learning_rate=1.0, max_steps=3, per_device_eval_batch_size=batch)
    made.train()
    expected, accuracy = completion_loss(made.model.eval(), rows).item(), completion_accuracy(made.model, rows)
    assert 0 < accuracy < 1
    result = made.evaluate()
    assert result["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert result["eval_mean_token_accuracy"] == pytest.approx(accuracy, rel=1e-6)
    logged = next(record for record in made.state.log_history if "eval_loss" in record)
    names = ("eval_loss", "eval_mean_token_accuracy", "eval_entropy")
    assert all(logged[name] == result[name] for name in names)


@pytest.mark.parametrize("changes", [{"label_smoothing_factor": 0.1}, {"loss_type": "dft"}])
def test_evaluated_loss_is_the_trained_one(make_policy, trainer, changes):
    """Label smoothing and DFT change both losses; one batch holds every demonstration here."""
    made = trainer(make_policy(), per_device_eval_batch_size=4, **changes)
    before = made.evaluate()["eval_loss"]
    made.train()
    logged = next(record["loss"] for record in made.state.log_history if "loss" in record)
    assert before == pytest.approx(logged, rel=1e-4)


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_step_is_that_of_the_whole_batch(make_policy, rows, trainer, batch, accumulation):
    """One SGD step moves every weight by -lr * gradient of the mean over all completion tokens, however split."""
    model = make_policy()
    start = weights(model)
    reference = copy.deepcopy(model)
    completion_loss(reference, rows).backward()
    trainer(model, batch, accumulation, max_grad_norm=0.0).train()
    for name, item in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).detach(), start[name] - 1e-2 * item.grad)


def test_every_parameter_moves(make_policy, trainer):
    model = make_policy()
    start = weights(model)
    trainer(model, optim="adamw_torch").train()
    assert [name for name, item in weights(model).items() if torch.equal(item, start[name])] == []


def test_adapter_moves_and_the_base_does_not(make_policy, trainer):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.0)
    model = get_peft_model(make_policy(), config)
    start = weights(model)
    trainer(model, max_steps=2, optim="adamw_torch").train()
    moved = {name for name, item in weights(model).items() if not torch.equal(item, start[name])}
    assert moved == {name for name, item in model.named_parameters() if item.requires_grad}
    assert moved == {name for name in start if "lora_" in name}


def test_learning_rate_falls_to_a_tenth(make_policy, trainer):
    """The default schedule is the paper's cosine without warm-up (C.1)."""
    made = trainer(
        make_policy(), max_steps=8, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1}
    )
    made.train()
    rates = [record["learning_rate"] for record in made.state.log_history if "learning_rate" in record]
    assert rates[0] == pytest.approx(1e-2) and sorted(rates, reverse=True) == rates
    assert made.lr_scheduler.get_last_lr()[0] == pytest.approx(1e-3)


def test_no_card_is_written(make_policy, trainer, tmp_path):
    made = trainer(make_policy(), save_strategy="steps", save_steps=1)
    made.train()
    assert (tmp_path / "work" / "checkpoint-1").is_dir()
    assert not list(tmp_path.rglob("README.md"))


def test_only_the_best_is_saved(trainer, make_policy, tmp_path):
    best = dict(save_strategy="best", eval_strategy="steps", eval_steps=1, metric_for_best_model="loss", max_steps=2)
    run = trainer(make_policy(), save_total_limit=1, **best)
    run.train()
    assert [item.name for item in (tmp_path / "work").glob("checkpoint-*")] == ["checkpoint-2"]
    assert run.state.best_model_checkpoint == str(tmp_path / "work" / "checkpoint-2")
