"""Stage 2's trainer: equation 1 against a double loop and TRL's pairwise trainer, whatever the batch split."""

import copy
import itertools
import math

import pytest
import torch
import trl
from datasets import Dataset
from helpers.reward_trainer import build_trainer
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification

# Four prompts with 2 to 4 completions of different lengths; two of them have ties.
ROWS = [
    {"prompt_ids": [5, 6], "completion_ids": [[7, 1], [8, 9, 10, 1]], "ranks": [2, 1]},
    {"prompt_ids": [11], "completion_ids": [[12, 1], [13, 14, 1], [1], [15, 16, 17, 1]], "ranks": [1, 3, 2, 4]},
    {"prompt_ids": [20], "completion_ids": [[21, 22, 1], [23, 1], [24, 25, 26, 27, 1]], "ranks": [1, 2, 1]},
    {"prompt_ids": [30, 3], "completion_ids": [[1], [31, 1], [32, 33, 1], [34, 1]], "ranks": [2, 1, 2, 3]},
]
RATE = 0.1


@pytest.fixture
def trainer(tokenizer, tmp_path):
    """A trainer that takes one SGD step over all prompts."""

    def build(
        model,
        rows=ROWS,
        batch=4,
        accumulation=1,
        shared=True,
        side="right",
        compute_metrics=None,
        refusal=None,
        **changes,
    ):
        made = build_trainer(
            model,
            tokenizer,
            tmp_path / "work",
            rows,
            compute_metrics=compute_metrics,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=2,
            gradient_accumulation_steps=accumulation,
            **{"learning_rate": RATE, "max_grad_norm": 0.0, **changes},
        )
        assert made.shared_prefix_refusal == refusal
        made.data_collator.padding_side = side
        if not shared:
            made.data_collator.hidden_size = None
        return made

    return build


def scorer_without_positions():
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0, attention_dropout=0)
    config = AutoConfig.for_model("bloom", num_labels=1, pad_token_id=0, eos_token_id=1, **sizes)
    return AutoModelForSequenceClassification.from_config(config)


def weights(model):
    return {name: item.detach().clone() for name, item in model.named_parameters()}


def first_loss(trainer):
    return next(record["loss"] for record in trainer.state.log_history if "loss" in record)


def pairs_of(row):
    """Indices (better, worse) of every strictly ranked pair."""
    count = len(row["ranks"])
    return [(i, j) for i, j in itertools.product(range(count), repeat=2) if row["ranks"][i] < row["ranks"][j]]


def sequences(row):
    """Every completion with its prompt."""
    return [row["prompt_ids"] + ids for ids in row["completion_ids"]]


def score(model, ids):
    return model(torch.tensor([ids])).logits[0, 0]


def loop_loss(model, rows=ROWS):
    """Mean over prompts of the mean over pairs, each completion scored alone and without padding."""
    total = 0.0
    for row in rows:
        scores = [score(model, ids) for ids in sequences(row)]
        losses = [torch.log1p(torch.exp(scores[worse] - scores[better])) for better, worse in pairs_of(row)]
        total = total + sum(losses) / len(losses)
    return total / len(rows)


def stepped(model, loss):
    """Weights after one SGD step on `loss`."""
    loss.backward()
    return {name: item.detach() - RATE * item.grad for name, item in model.named_parameters()}


class TestLoss:
    def test_is_the_double_loop(self, make_scorer, trainer):
        model = make_scorer()
        expected = loop_loss(copy.deepcopy(model)).item()
        made = trainer(model)
        batch = made.data_collator(ROWS)
        assert made.compute_loss(made.model, batch).item() == pytest.approx(expected, rel=1e-5)
        made.train()
        assert first_loss(made) == pytest.approx(expected, rel=1e-4)

    def test_hand_computed(self, trainer, make_scorer):
        """Scores 2, 1, 1 and ranks 1, 2, 2: two pairs of gap 1 and a tie, loss log(1 + 1/e)."""
        made = trainer(make_scorer())
        scores = torch.tensor([2.0, 1.0, 1.0])
        fixed = lambda **_: type("Output", (), {"logits": scores})()  # noqa: E731
        row = {"prompt_ids": [4], "completion_ids": [[5, 1], [6, 1], [7, 1]], "ranks": [1, 2, 2]}
        assert made.compute_loss(fixed, made.data_collator([row])).item() == pytest.approx(
            math.log1p(math.exp(-1)), rel=1e-6
        )

    def test_gradient_by_finite_differences(self, make_scorer, trainer):
        """Through the head, and through the body below it."""
        made = trainer(make_scorer())
        with torch.no_grad():
            made.model.score.weight.normal_(generator=torch.Generator().manual_seed(0))
        batch = made.data_collator(ROWS)
        made.compute_loss(made.model, batch).backward()
        step = 1e-2
        for name in ("score.weight", "model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"):
            weight = made.model.get_parameter(name)
            direction = weight.grad / weight.grad.norm()
            ends = []
            with torch.no_grad():
                for sign in (1, -1):
                    weight += sign * step * direction
                    ends.append(made.compute_loss(made.model, batch).item())
                    weight -= sign * step * direction
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(weight.grad.norm().item(), rel=1e-2), name

    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    @pytest.mark.parametrize("side", ["right", "left"])
    @pytest.mark.parametrize("shared", [True, False])
    @pytest.mark.parametrize(
        ("batch", "accumulation", "tokens"), [(4, 1, 1000), (2, 2, 1000), (1, 4, 1000), (3, 2, 1000), (4, 1, 1)]
    )
    def test_step_does_not_depend_on_the_split_or_padding(
        self, make_scorer, trainer, architecture, side, shared, batch, accumulation, tokens
    ):
        model = make_scorer(
            architecture, **({"resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0} if architecture == "gpt2" else {})
        )
        expected = stepped(*(lambda other: (other, loop_loss(other)))(copy.deepcopy(model)))
        made = trainer(
            model,
            batch=batch,
            accumulation=accumulation,
            shared=shared,
            side=side,
            max_tokens_per_forward=tokens,
        )
        made.train()
        for name, item in weights(model).items():
            torch.testing.assert_close(item, expected[name], rtol=1e-4, atol=1e-6)

    def test_unfinished_accumulation_counts_its_own_prompts(self, make_scorer, trainer):
        """Three prompts in micro-batches of two: the last step holds one prompt and averages over three in all."""
        model = make_scorer()
        other = copy.deepcopy(model)
        expected = stepped(other, loop_loss(other, ROWS[:3]))
        trainer(model, rows=ROWS[:3], batch=2, accumulation=2).train()
        for name, item in weights(model).items():
            torch.testing.assert_close(item, expected[name], rtol=1e-4, atol=1e-6)


class TestAgainstTRL:
    """TRL's trainer on every pair of a prompt, one prompt a batch, is the oracle of one prompt's loss and gradient."""

    @pytest.fixture
    def pairwise(self, tokenizer, tmp_path):
        def build(model, row):
            whole = sequences(row)
            pairs = [{"chosen_ids": whole[better], "rejected_ids": whole[worse]} for better, worse in pairs_of(row)]
            args = trl.RewardConfig(
                output_dir=str(tmp_path / "trl"),
                per_device_train_batch_size=len(pairs),
                learning_rate=RATE,
                lr_scheduler_type="constant",
                max_steps=1,
                max_grad_norm=0.0,
                optim="sgd",
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
            )
            made = trl.RewardTrainer(
                model=model, args=args, processing_class=tokenizer, train_dataset=Dataset.from_list(pairs)
            )
            made.train()
            return first_loss(made)

        return build

    def test_equal_loss_and_gradients(self, make_scorer, trainer, pairwise):
        model = make_scorer()
        start = weights(model)
        losses, moves = [], {name: torch.zeros_like(item) for name, item in start.items()}
        for row in ROWS:
            other = copy.deepcopy(model)
            losses.append(pairwise(other, row))
            for name, item in weights(other).items():
                moves[name] += (item - start[name]) / len(ROWS)
        made = trainer(model)
        made.train()
        assert first_loss(made) == pytest.approx(sum(losses) / len(losses), rel=1e-3)
        for name, item in weights(model).items():
            torch.testing.assert_close(item - start[name], moves[name], rtol=1e-3, atol=1e-6)


class TestFallback:
    def test_is_logged_once_and_computes_the_same(self, trainer, caplog):
        """Bloom cannot be told positions: every completion gets a row of its own."""
        model = scorer_without_positions()
        with caplog.at_level("WARNING", "instructgpt_hf"):
            made = trainer(model, refusal="BloomForSequenceClassification cannot be told the positions of its tokens")
            made.evaluate()
            expected = stepped(*(lambda other: (other, loop_loss(other)))(copy.deepcopy(model)))
            made.train()
        logged = [
            record.getMessage() for record in caplog.records if "with a copy of its prompt" in record.getMessage()
        ]
        assert logged == [
            "Every completion is computed with a copy of its prompt, because BloomForSequenceClassification cannot be "
            "told the positions of its tokens."
        ]
        for name, item in weights(model).items():
            torch.testing.assert_close(item, expected[name], rtol=1e-4, atol=1e-6)


class TestTies:
    def test_tied_pairs_contribute_nothing(self, make_scorer, trainer):
        """Ranks 1, 2, 1: the first and the third each beat the second, and are no pair themselves."""
        made = trainer(make_scorer())
        row = ROWS[2]
        scores = [score(made.model, ids) for ids in sequences(row)]
        expected = -sum(torch.nn.functional.logsigmoid(scores[index] - scores[1]) for index in (0, 2)) / 2
        assert made.compute_loss(made.model, made.data_collator([row])).item() == pytest.approx(
            expected.item(), rel=1e-5
        )

    def test_a_prompt_of_ties_gives_no_gradient(self, make_scorer, trainer):
        made = trainer(make_scorer())
        loss = made.compute_loss(made.model, made.data_collator([{**ROWS[1], "ranks": [1, 1, 1, 1]}]))
        loss.backward()
        assert loss.item() == 0.0
        assert all(item.grad is None or not item.grad.any() for item in made.model.parameters())


class TestParameters:
    @pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
    def test_every_parameter_moves(self, make_scorer, trainer, architecture):
        model = make_scorer(architecture)
        start = weights(model)
        trainer(model, optim="adamw_torch", learning_rate=1e-3).train()
        assert [name for name, item in weights(model).items() if torch.equal(item, start[name])] == []

    def test_adapter_and_head_move_and_the_base_does_not(self, make_scorer, trainer):
        config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", modules_to_save=["score"])
        model = get_peft_model(make_scorer(), config)
        start = weights(model)
        trainer(model, optim="adamw_torch", learning_rate=1e-3, max_steps=2).train()
        moved = {name for name, item in weights(model).items() if not torch.equal(item, start[name])}
        assert moved == {name for name, item in model.named_parameters() if item.requires_grad}
        assert moved == {name for name in start if "lora_" in name or "modules_to_save" in name}

    def test_the_better_completion_rises(self, make_scorer, trainer):
        made = trainer(make_scorer(), optim="adamw_torch", learning_rate=3e-3, max_steps=15)
        made.train()
        losses = [record["loss"] for record in made.state.log_history if "loss" in record]
        assert losses[-1] < 0.5 * losses[0]
        assert made.evaluate()["eval_accuracy"] == 1.0


class TestMetrics:
    def test_evaluation(self, make_scorer, trainer):
        """Over all prompts and pairs, whatever the batches."""
        model = make_scorer()
        found = trainer(model, rows=ROWS[:3]).evaluate()
        model.eval()
        with torch.no_grad():
            scores = [[score(model, ids).item() for ids in sequences(row)] for row in ROWS[:3]]
            expected = loop_loss(model, ROWS[:3]).item()
        gaps = [
            own[better] - own[worse]
            for own, row in zip(scores, ROWS[:3], strict=True)
            for better, worse in pairs_of(row)
        ]
        every = torch.tensor(list(itertools.chain(*scores)))
        oracle = {
            "eval_loss": expected,
            "eval_accuracy": sum(gap > 0 for gap in gaps) / len(gaps),
            "eval_margin": sum(gaps) / len(gaps),
            "eval_mean_reward": every.mean().item(),
            "eval_std_reward": every.std(unbiased=False).item(),
            "eval_min_reward": every.min().item(),
            "eval_max_reward": every.max().item(),
        }
        assert {name: found[name] for name in oracle} == pytest.approx(oracle, rel=1e-3)

    def test_compute_metrics_sees_every_prompt_once(self, make_scorer, trainer):
        model, seen = make_scorer(), {}

        def compute_metrics(prediction):
            seen["prediction"] = prediction
            return {"accuracy": 0.25, "prompts": len(prediction.label_ids)}

        found = trainer(model, rows=ROWS[:3], compute_metrics=compute_metrics).evaluate()
        assert found["eval_accuracy"] == 0.25 and found["eval_prompts"] == 3
        prediction = seen["prediction"]
        order = [prediction.label_ids.index(row["ranks"]) for row in ROWS[:3]]
        assert sorted(order) == [0, 1, 2]
        model.eval()
        for place, row in zip(order, ROWS, strict=False):
            expected = [score(model, ids).item() for ids in sequences(row)]
            assert prediction.predictions[place] == pytest.approx(expected, rel=1e-4, abs=1e-6)
            assert prediction.inputs[place] == [len(ids) for ids in row["completion_ids"]]

    def test_training_log(self, make_scorer, trainer):
        """The metrics of a step are over all its pairs, however many forward passes it takes."""
        logs = []
        for tokens in (1000, 1):
            made = trainer(make_scorer(), max_tokens_per_forward=tokens)
            made.train()
            logs.append(made.state.log_history[0])
        names = {"loss", "accuracy", "margin", "mean_reward", "std_reward", "min_reward", "max_reward"}
        assert names <= set(logs[0])
        assert {name: logs[0][name] for name in names} == pytest.approx(
            {name: logs[1][name] for name in names}, rel=1e-4
        )

    def test_no_card_is_written(self, make_scorer, trainer, tmp_path):
        trainer(make_scorer(), save_strategy="steps", save_steps=1).train()
        assert (tmp_path / "work" / "checkpoint-1").is_dir() and not list(tmp_path.rglob("README.md"))
