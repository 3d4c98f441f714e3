"""How two gradients that are accumulated in the same buffers compare."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor, nn


class GradientComparison:
    """Length ratio and angle of the gradient already in the buffers and the one that the block adds.

    The block runs one backward pass that reaches the parameters. Each one's new gradient is seen on its way into the
    buffer, so no second copy of the gradients exists, and under DistributedDataParallel both are this process's own.

    Args:
        parameters: those to compare over; frozen ones are left out.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [item for item in parameters if item.requires_grad]
        self._before = self._added = self._product = torch.zeros(())

    def __enter__(self) -> GradientComparison:
        self._handles = [item.register_hook(self._hook(item)) for item in self.parameters]
        squares = [item.grad.float().square().sum() for item in self.parameters if item.grad is not None]
        self._before = torch.stack(squares).sum() if squares else self._before
        return self

    def _hook(self, parameter: nn.Parameter) -> object:
        def see(gradient: Tensor) -> None:
            wide = gradient.detach().float()
            self._added = self._added + wide.square().sum()
            if parameter.grad is not None:
                self._product = self._product + (parameter.grad.float() * wide).sum()

        return see

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def ratio(self) -> Tensor:
        """Length of the gradient before over that of the one added."""
        return (self._before / self._added.clamp(min=1e-24)).sqrt()

    @property
    def cosine(self) -> Tensor:
        """Cosine of the angle between them; 0 if one of them is 0."""
        lengths = self._before.sqrt() * self._added.sqrt()
        return torch.where(lengths > 0, self._product / lengths.clamp(min=1e-24), 0.0)
