"""Stage 2: the reward model on trl.RewardTrainer, all pairs of a prompt as one batch element (InstructGPT eq. 1)."""

from __future__ import annotations

from typing import Any

import torch

from instructgpt_hf._compat import RankingTrainer
from instructgpt_hf.data.rankings import RankingCollator
from instructgpt_hf.functional.ranking import all_pairs_loss, pairwise_accuracy
from instructgpt_hf.models.reward_model import model_inputs


class RewardTrainer(RankingTrainer):
    """trl.RewardTrainer whose batch element is a prompt with its K ranked completions.

    Each completion goes through the model once. The loss is the mean over a prompt's strictly ranked pairs of
    -log sigmoid(r_better - r_worse), then the mean over the prompts of the optimizer step, however the step is split
    into micro-batches and processes. Tied pairs contribute nothing.

    Args:
        model: sequence classifier with one label, from `instructgpt_hf.models.reward_model.create_reward_model`.
        args: `RewardConfig`; batch sizes count prompts.
        train_dataset: `completions_ids` and `ranks`, from `instructgpt_hf.data.rankings.tokenize_rankings`.
        eval_dataset: the same for held-out prompts.
        processing_class: tokenizer with a padding token that differs from EOS.
    """

    # The loss is already the mean over the accumulated batch.
    loss_is_scaled_for_ga = True
    dataset_columns = ("completions_ids", "ranks")

    def __init__(self, model: Any, args: Any, *, processing_class: Any, **kwargs: Any) -> None:
        kwargs.setdefault("data_collator", RankingCollator(processing_class.pad_token_id))
        super().__init__(model=model, args=args, processing_class=processing_class, **kwargs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Equation 1 on one micro-batch.

        Args:
            inputs: what `RankingCollator` returns.
            num_items_in_batch: prompts of the whole optimizer step, over micro-batches and processes; None in
                evaluation, which averages over the prompts here.
        """
        # Through the (possibly distributed) wrapper, whose hooks synchronise gradients. The classifier reads the score
        # at the last token that is not padding, which is EOS.
        batch = model_inputs(self.model, inputs["input_ids"], inputs["attention_mask"])
        scores = model(**batch).logits.squeeze(-1).float()
        losses = all_pairs_loss(scores, inputs["ranks"], inputs["groups"])
        prompts = losses.numel() if num_items_in_batch is None else num_items_in_batch
        loss = losses.sum() / prompts
        if num_items_in_batch is not None:
            # Gradients are averaged over processes, and `prompts` counts those of all of them.
            loss = loss * self.accelerator.num_processes
        self._record(scores.detach(), inputs)
        return (loss, {"scores": scores.detach()}) if return_outputs else loss

    def _record(self, scores: torch.Tensor, inputs: dict[str, Any]) -> None:
        correct, pairs = pairwise_accuracy(scores, inputs["ranks"], inputs["groups"])
        totals = self.accelerator.gather(torch.stack([correct.sum(), pairs.sum()]).reshape(1, 2).float()).sum(0)
        everyone = self.accelerator.gather_for_metrics(scores)
        self.record("accuracy", (totals[0] / totals[1].clamp(min=1)).item())
        self.record("mean_reward", everyone.mean().item())
        self.record("std_reward", everyone.std(unbiased=False).item())
