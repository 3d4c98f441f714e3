"""Stage 2's trainer: equation 1 against a double loop and TRL's pairwise trainer, whatever the batch split."""

import copy
import itertools
import math

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from instructgpt_hf.config.stages import RewardConfig
from instructgpt_hf.data.rankings import RankingCollator
from instructgpt_hf.trainers.reward import RewardTrainer

# Four prompts with 2 to 4 completions of different lengths; two of them have ties.
ROWS = [
    {"completions_ids": [[5, 6, 7, 1], [5, 6, 8, 9, 10, 1]], "ranks": [2, 1]},
    {"completions_ids": [[11, 12, 1], [11, 13, 14, 1], [11, 1], [11, 15, 16, 17, 1]], "ranks": [1, 3, 2, 4]},
    {"completions_ids": [[20, 21, 22, 1], [20, 23, 1], [20, 24, 25, 26, 27, 1]], "ranks": [1, 2, 1]},
    {"completions_ids": [[30, 1], [30, 31, 1], [30, 32, 33, 1], [30, 34, 1]], "ranks": [2, 1, 2, 3]},
]
RATE = 0.1


@pytest.fixture
def trainer(tokenizer, tmp_path):
    """A trainer that takes one SGD step over all prompts."""

    def build(model, rows=ROWS, batch=4, accumulation=1, side="right", **changes):
        settings = dict(
            output_dir=str(tmp_path / "work"),
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=2,
            gradient_accumulation_steps=accumulation,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            max_steps=1,
            max_grad_norm=0.0,
            optim="sgd",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        data = Dataset.from_list(rows)
        return RewardTrainer(
            model,
            RewardConfig(**{**settings, **changes}),
            processing_class=tokenizer,
            train_dataset=data,
            eval_dataset=data,
            data_collator=RankingCollator(tokenizer.pad_token_id, side),
        )

    return build


def weights(model):
    return {name: item.detach().clone() for name, item in model.named_parameters()}


def first_loss(trainer):
    return next(record["loss"] for record in trainer.state.log_history if "loss" in record)


def pairs_of(row):
    """Indices (better, worse) of every strictly ranked pair."""
    count = len(row["ranks"])
    return [(i, j) for i, j in itertools.product(range(count), repeat=2) if row["ranks"][i] < row["ranks"][j]]


def score(model, ids):
    return model(torch.tensor([ids])).logits[0, 0]


def loop_loss(model, rows=ROWS):
    """Mean over prompts of the mean over pairs, each completion scored alone and without padding."""
    total = 0.0
    for row in rows:
        scores = [score(model, ids) for ids in row["completions_ids"]]
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
        scores = torch.tensor([[2.0], [1.0], [1.0]])
        fixed = lambda **_: type("Output", (), {"logits": scores})()  # noqa: E731
        batch = made.data_collator([{"completions_ids": [[5, 1], [6, 1], [7, 1]], "ranks": [1, 2, 2]}])
        assert made.compute_loss(fixed, batch).item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-6)

    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    @pytest.mark.parametrize("side", ["right", "left"])
    @pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2), (1, 4), (3, 2)])
    def test_step_does_not_depend_on_the_split_or_padding(
        self, make_scorer, trainer, architecture, side, batch, accumulation
    ):
        model = make_scorer(
            architecture, **({"resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0} if architecture == "gpt2" else {})
        )
        expected = stepped(*(lambda other: (other, loop_loss(other)))(copy.deepcopy(model)))
        trainer(model, batch=batch, accumulation=accumulation, side=side).train()
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
            pairs = [
                {"chosen_ids": row["completions_ids"][better], "rejected_ids": row["completions_ids"][worse]}
                for better, worse in pairs_of(row)
            ]
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


class TestTies:
    def test_tied_pairs_contribute_nothing(self, make_scorer, trainer):
        """Ranks 1, 2, 1: the first and the third each beat the second, and are no pair themselves."""
        made = trainer(make_scorer())
        row = ROWS[2]
        scores = [score(made.model, ids) for ids in row["completions_ids"]]
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
        """Loss and accuracy of batches of two prompts, averaged over batches, against loops over single sequences."""
        model = make_scorer()
        found = trainer(model).evaluate()
        model.eval()
        with torch.no_grad():
            assert found["eval_loss"] == pytest.approx(loop_loss(model).item(), rel=1e-5)
            accuracies, means = [], []
            for batch in (ROWS[:2], ROWS[2:]):
                scores = [[score(model, ids).item() for ids in row["completions_ids"]] for row in batch]
                hits = [
                    own[better] > own[worse]
                    for own, row in zip(scores, batch, strict=True)
                    for better, worse in pairs_of(row)
                ]
                accuracies.append(sum(hits) / len(hits))
                means.append(sum(map(sum, scores)) / sum(map(len, scores)))
        assert found["eval_accuracy"] == pytest.approx(sum(accuracies) / 2)
        assert found["eval_mean_reward"] == pytest.approx(sum(means) / 2, rel=1e-4)
        assert found["eval_std_reward"] > 0

    def test_training_log(self, make_scorer, trainer):
        made = trainer(make_scorer())
        made.train()
        assert {"loss", "accuracy", "mean_reward", "std_reward"} <= set(made.state.log_history[0])

    def test_no_card_is_written(self, make_scorer, trainer, tmp_path):
        trainer(make_scorer(), save_strategy="steps", save_steps=1).train()
        assert (tmp_path / "work" / "checkpoint-1").is_dir() and not list(tmp_path.rglob("README.md"))
