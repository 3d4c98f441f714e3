"""The reward model's loss on K ranked completions per prompt (InstructGPT section 3.5, equation 1).

All completions of a batch lie in vectors of length M: `scores` are rewards, `ranks` say which completion is better
(1 is best, equal ranks are a tie), `groups` says which prompt each belongs to, by any integers in any order. Results
per prompt are [G], in increasing order of group.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def strict_pairs(ranks: Tensor, groups: Tensor) -> Tensor:
    """Bool [M, M]; entry (i, j) is true if completions i and j belong to the same prompt and i is strictly better."""
    _check_vectors(ranks=ranks, groups=groups)
    return (groups[:, None] == groups[None, :]) & (ranks[:, None] < ranks[None, :])


def all_pairs_loss(scores: Tensor, ranks: Tensor, groups: Tensor) -> Tensor:
    """Equation 1 for every prompt: the mean of -log sigmoid(score of the better - score of the worse) over its pairs.

    The paper divides by K(K-1)/2 and drops ties without saying whether the divisor shrinks with them; here it is the
    number of strict pairs, so a prompt's weight does not depend on how many of its completions tie.

    Args:
        scores: [M], floating point; half precision is computed in float32.
        ranks: [M].
        groups: [M].

    Returns:
        [G]; 0 for a prompt without a strict pair, which `pair_counts` tells apart. The batch loss is the mean over
        prompts that have pairs.
    """
    _check_vectors(scores=scores, ranks=ranks, groups=groups)
    better, worse, group, counts = _pairs(ranks, groups)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    losses = -F.logsigmoid(scores[better] - scores[worse])
    return losses.new_zeros(len(counts)).index_add(0, group, losses) / counts.clamp(min=1)


def pair_counts(ranks: Tensor, groups: Tensor) -> Tensor:
    """Number of strict pairs of every prompt, int64 [G]."""
    return _pairs(ranks, groups)[3]


def _pairs(ranks: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices of the better and the worse completion and the position of the group, per pair; pairs per group."""
    better, worse = strict_pairs(ranks, groups).nonzero(as_tuple=True)
    names, position = torch.unique(groups, return_inverse=True)
    group = position[better]
    return better, worse, group, torch.bincount(group, minlength=len(names))


def _check_vectors(**tensors: Tensor) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if any(len(shape) != 1 for shape in shapes.values()) or len({tuple(shape) for shape in shapes.values()}) > 1:
        raise ValueError(
            "Expected vectors of one length, got " + ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        )
