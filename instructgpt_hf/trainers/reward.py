"""Stage 2: the reward model on trl.RewardTrainer, all pairs of a prompt as one batch element (InstructGPT eq. 1)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from instructgpt_hf._compat.quirks import keep_trained_weights, restore_cpu_gradients, use_one_device
from instructgpt_hf._compat.trainers import RankingTrainer
from instructgpt_hf.config.training import RewardConfig
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.rankings.batches import RankingCollator, RankingPass
from instructgpt_hf.functional.ranking import all_pairs_loss, strict_pairs
from instructgpt_hf.models.prefix_sharing import CompletionScorer, shared_prefix_refusal
from instructgpt_hf.models.reward_model import save_classifier_record
from instructgpt_hf.models.scoring import reward_shift
from instructgpt_hf.trainers.inputs import ModelSource, chosen_format, refuse, settled_args
from instructgpt_hf.trainers.rows import RowReader, each, training_rows

logger = logging.getLogger(__name__)

_REFUSED = {
    "data_collator": "is the trainer's own, which lays rankings out in forward passes.",
    "preprocess_logits_for_metrics": "there are no logits; compute_metrics gets the scores.",
}


class _Prompt(NamedTuple):
    """One held-out prompt: its place in the batch, its loss, and scores [K], ranks [K] and lengths [K]."""

    place: int
    loss: float
    scores: list[float]
    ranks: list[int]
    lengths: list[int]


class _Scored(NamedTuple):
    """One forward pass: losses [prompts]; scores, ranks, groups and lengths [M]."""

    losses: Tensor
    scores: Tensor
    ranks: Tensor
    groups: Tensor
    lengths: Tensor

    def by_prompt(self) -> list[_Prompt]:
        """The prompts of the pass."""
        places, sizes = (item.tolist() for item in torch.unique_consecutive(self.groups, return_counts=True))
        columns = [
            [part.tolist() for part in column.split(sizes)] for column in (self.scores, self.ranks, self.lengths)
        ]
        return list(map(_Prompt, places, self.losses.tolist(), *columns))


class RewardTrainer(RankingTrainer):
    """trl.RewardTrainer on rankings: a batch element is a prompt with its K ranked completions.

    Each completion goes through the model once, and where the architecture allows it, completions of a prompt share
    the prompt's computation. The loss is the mean over a prompt's strictly ranked pairs of
    -log sigmoid(r_better - r_worse), then the mean over the prompts of the optimizer step, however the step is split
    into micro-batches, forward passes and processes. Tied pairs contribute nothing.

    | TRL's and the Trainer's | this package's |
    |---|---|
    | training loop, mixed precision, DeepSpeed, FSDP | loading, tokenization, batches that count prompts |
    | optimizer, schedule, clipping the gradient | equation 1 over all pairs of a prompt |
    | PEFT, quantised models | trained weights that TRL would round stay as they are |
    | logging, trackers, the metrics' names | their computation over all pairs, `std_reward`, `compute_metrics` |
    | gradient accumulation | passes of bounded size; prompts computed once for their completions |
    | the evaluation loop | the loss as a mean over prompts, scores of every prompt |
    | checkpoints, `push_to_hub` | whole folders; private, without TRL's model card |

    Args:
        model: Hub id or folder, or `"lab"`: a causal language model such as the SFT model gets a fresh scalar head, a
            reward model is trained further. Or a sequence classifier with one label in memory.
        args: `RewardConfig`; batch sizes count prompts. The prompts of a micro-batch are sorted by length and go
            through the model in forward and backward passes of at most `max_tokens_per_forward` tokens. Completions
            over `max_length` are left out, not cut. `center_on_demonstrations` acts in recipes.
        data_collator: cannot be replaced.
        train_dataset: rankings in any form of `data.rankings.schemas`, such as TRL's `chosen` and `rejected`; or
            `prompt_ids`, `completion_ids` [K] and `ranks` [K].
        eval_dataset: the same for held-out prompts, or a dict of several by name.
        processing_class: the tokenizer, the model's own by default.
        peft_config: of the adapter to train on a whole model; the head is trained and saved with it.
        quantization_config: of the frozen weights of a model by its name.
        prompt_format: a `PromptFormat` or its name; by default the one that the model was trained with, the
            tokenizer's chat template, or without one the prompt as it is.
        compute_metrics: called at every evaluation with an `EvalPrediction` of lists over prompts: `predictions`, the
            scores [K] of each; `label_ids`, its ranks [K]; `inputs`, the lengths [K] of its completions in tokens.
            Its result is logged with the prefix `eval_`.
        kwargs: for `trl.RewardTrainer`: callbacks, optimizers, ...

    Raises:
        InstructGPTError: if model, data or settings cannot be used; before weights are loaded where possible.

    Attributes:
        shared_prefix_refusal: why completions do not share their prompt's computation, or None if they do.
    """

    # The loss is already the mean over the accumulated batch.
    loss_is_scaled_for_ga = True
    dataset_columns = ("prompt_ids", "completion_ids", "ranks")

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        args: RewardConfig | None = None,
        data_collator: None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        *,
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
        prompt_format: PromptFormat | str | None = None,
        **kwargs: Any,
    ) -> None:
        args = settled_args(args, RewardConfig, model, "Reward")
        refuse({**kwargs, "data_collator": data_collator}, _REFUSED)
        use_one_device(args)
        set_seed(args.seed)
        source = ModelSource(model, args, quantization_config)
        tokenizer = source.tokenizer(processing_class)
        pad_token_id = tokenizer.pad_token_id
        self.prompt_format = chosen_format(prompt_format, tokenizer, source.folder)
        self.reader = RowReader.of(self.prompt_format, tokenizer, source.config, args.max_length)
        train = training_rows(train_dataset, self.reader.rankings)
        held_back = each(eval_dataset, "eval_dataset", self.reader.rankings)
        collator = RankingCollator(pad_token_id, args.max_tokens_per_forward)
        model = source.classifier(tokenizer, args.seed, peft_config)
        restore_cpu_gradients(model)
        with keep_trained_weights(model):
            super().__init__(
                model=model,
                args=args,
                data_collator=collator,
                train_dataset=train,
                eval_dataset=held_back,
                processing_class=tokenizer,
                compute_metrics=compute_metrics,
                **kwargs,
            )
        self.scorer = CompletionScorer(self.model)
        # Every process lays out its batches the same way, also where only the first one holds the weights yet.
        refusal = [shared_prefix_refusal(self.scorer, pad_token_id, self._attention_dtype)]
        self.shared_prefix_refusal: str | None = broadcast_object_list(refusal)[0]
        if self.shared_prefix_refusal is None:
            collator.hidden_size = self.scorer.classifier.config.get_text_config().hidden_size
        elif self.accelerator.is_main_process:
            logger.warning(
                "Every completion is computed with a copy of its prompt, because %s.", self.shared_prefix_refusal
            )
        # Where processes hold parts of the model, all of them call it in the same order.
        collator.whole_rankings = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self._passes: list[tuple[Tensor, Tensor, Tensor]] = []  # scores, ranks and groups of the optimizer step
        self._evaluated: list[_Prompt] = []

    @property
    def _attention_dtype(self) -> torch.dtype | None:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """The micro-batches of one optimizer step, and the number of prompts in them over all processes."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        prompts = torch.tensor([sum(len(sample["labels"]) for sample in samples)], device=device)
        return samples, self.accelerator.gather(prompts).sum()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward passes of one micro-batch; gradients are synchronised after the last one."""
        forwards = inputs["forwards"]
        if len(forwards[-1]) > 1 and self.accelerator.num_processes > 1:
            # Parts are recomputed in the backward pass, which must not coincide with the synchronisation of gradients.
            forwards = [*forwards, _tied(forwards[-1][-1:])]
        forwards = self._as_many_as_others(forwards)
        loss = torch.zeros((), device=self.args.device)
        for number, parts in enumerate(forwards, start=1):
            last = number == len(forwards)
            with contextlib.nullcontext() if last else self.without_gradient_sync(model):
                loss += super().training_step(model, {"forwards": [parts]}, num_items_in_batch)
        if self.accelerator.sync_gradients:  # the last micro-batch of the optimizer step
            for name, value in _pair_metrics(self._passes, self.accelerator.gather).items():
                self.record(name, value)
            self._passes.clear()
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, list[_Scored]]:
        """Equation 1; with `return_outputs` also the scores of every pass.

        `num_items_in_batch` counts the prompts of the whole optimizer step, over micro-batches and processes; None
        averages over the prompts here.
        """
        passes = [self._score(model, parts) for parts in inputs["forwards"]]
        losses = torch.cat([item.losses for item in passes])
        if num_items_in_batch is None:
            loss = losses.mean()
        else:
            # Gradients are averaged over processes, and the count is that of all of them.
            loss = losses.sum() * self.accelerator.num_processes / num_items_in_batch
        return (loss, passes) if return_outputs else loss

    def _score(self, model: nn.Module, parts: list[RankingPass]) -> _Scored:
        """Losses and scores of one pass.

        A ranking that is larger than a pass goes through the model part by part. No part's activations are kept: they
        are recomputed in the backward pass.
        """
        dtype, parts = self._attention_dtype, [part.to(self.args.device) for part in parts]
        ranks, groups, lengths, places = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("ranks", "groups", "lengths", "places")
        )
        if len(parts) == 1:
            scores = self.scorer(model, parts[0], dtype)
        else:
            scores = torch.cat([checkpoint(self.scorer, model, part, dtype, use_reentrant=False) for part in parts])
            order = (groups * len(scores) + places).argsort()
            scores, ranks, groups, lengths = (item[order] for item in (scores, ranks, groups, lengths))
        result = _Scored(all_pairs_loss(scores, ranks, groups), scores.detach(), ranks, groups, lengths)
        self._passes.append((result.scores, ranks, groups))
        return result

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Loss of one batch of held-out prompts; their scores are kept for `compute_metrics`."""
        inputs = self._prepare_inputs(inputs)
        forwards = self._as_many_as_others(inputs["forwards"])
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, passes = self.compute_loss(model, {"forwards": forwards}, return_outputs=True)
        own = sorted(prompt for item in passes[-len(inputs["forwards"]) :] for prompt in item.by_prompt())
        self._evaluated += self.accelerator.gather_for_metrics(own, use_gather_object=True)
        return loss.detach(), None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """TRL's loop; then `compute_metrics` on the scores of all held-out prompts, and their mean loss.

        The predictions are the shifted scores [K] of every prompt, in the order of the dataset.
        """
        self._evaluated.clear()
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        _, losses, scores, ranks, lengths = (list(column) for column in zip(*self._evaluated, strict=True))
        self._evaluated.clear()
        self._passes.clear()
        prompts = [(torch.tensor(own), torch.tensor(rank)) for own, rank in zip(scores, ranks, strict=True)]
        passes = [(own, rank, torch.zeros(len(rank))) for own, rank in prompts]
        # Over all prompts; the Trainer's own loss is a mean over batches, of which the last one may be smaller.
        metrics = {"loss": sum(losses) / len(losses), **_pair_metrics(passes, lambda sums: sums)}
        if self.compute_metrics is not None:
            metrics |= self.compute_metrics(EvalPrediction(predictions=scores, label_ids=ranks, inputs=lengths))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        shift = reward_shift(self.scorer.classifier)
        shifted = [[score - shift for score in own] for own in scores]
        return output._replace(predictions=shifted, label_ids=ranks)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's evaluation; rankings are tokenized as those of the constructor."""
        return super().evaluate(each(eval_dataset, "eval_dataset", self.reader.rankings), *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Scores of rankings: `predictions` has a list [K] for each of them, `label_ids` its ranks [K].

        Raises:
            InstructGPTError: if a completion is too long, because nothing is left out here.
        """
        return super().predict(each(test_dataset, "test_dataset", self.reader.whole_rankings), *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write model and tokenizer so that `load_reward_model` and plain transformers load them."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            save_classifier_record(self.model, folder)
            self.prompt_format.save_tokenizer(self.processing_class, folder)

    def _as_many_as_others(self, forwards: list[list[RankingPass]]) -> list[list[RankingPass]]:
        """Forward passes, preceded by repeated ones up to the number of passes of the busiest process.

        Processes that shard a model must call it equally often; idle processes would wait as long.
        """
        if self.accelerator.num_processes == 1:
            return forwards
        most = self.accelerator.gather(torch.tensor([len(forwards)], device=self.args.device)).max().item()
        shortest = min(forwards, key=lambda parts: sum(part.input_ids.numel() for part in parts))
        return [_tied(shortest[-1:])] * (int(most) - len(forwards)) + forwards


def _tied(parts: list[RankingPass]) -> list[RankingPass]:
    """A copy of a pass in which all ranks tie, so that it adds no loss and no gradient."""
    return [replace(part, ranks=torch.ones_like(part.ranks)) for part in parts]


def _pair_metrics(
    passes: Iterable[tuple[Tensor, Tensor, Tensor]], gather: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """TRL's metrics of the scores and of the gaps of strict pairs, and the standard deviation of the scores.

    Args:
        passes: scores, ranks and groups [M] of every forward pass.
        gather: concatenates the rows [1, n] of all processes.
    """
    gap_list, score_list = [], []
    for own, ranks, groups in passes:
        better, worse = strict_pairs(ranks, groups).nonzero(as_tuple=True)
        if len(better):  # not a repeated pass of `_as_many_as_others`
            gap_list.append(own[better] - own[worse])
            score_list.append(own)
    if not gap_list:  # rankings of ties alone
        return {}
    gaps, scores = torch.cat(gap_list).double(), torch.cat(score_list).double()
    right = (gaps > 0).sum() + 0.5 * (gaps == 0).sum()
    counts = [torch.full_like(right, len(gaps)), torch.full_like(right, len(scores))]
    sums = torch.stack([right, gaps.sum(), scores.sum(), scores.square().sum(), *counts])
    right, margin, total, squares, pairs, number = gather(sums[None]).sum(0).tolist()
    extremes = gather(torch.stack([-scores.min(), scores.max()])[None]).amax(0).tolist()
    mean = total / number
    return {
        "accuracy": right / pairs,
        "margin": margin / pairs,
        "mean_reward": mean,
        "std_reward": max(0.0, squares / number - mean**2) ** 0.5,
        "min_reward": -extremes[0],
        "max_reward": extremes[1],
    }
