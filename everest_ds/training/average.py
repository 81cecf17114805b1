"""An exponential moving average of the weights, which generalises better than the last ones (EMA)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from everest_ds.config.finetuning import FinetuneRecipe
from everest_ds.config.schema import Recipe

# The average follows quickly at first: the initial weights are not worth remembering (TensorFlow's rule, timm's too).
_WARM_UP_STEPS = 10


class Average:
    """An fp32 copy of a model's parameters that follows them slowly.

    Not for ZeRO-3, whose parameters are spread over the ranks between steps.

    Args:
        model: whose parameters are averaged; in half precision these are the rounded ones.
        decay: share of the average that stays at each step, later on.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay, self._steps = decay, 0
        self._parameters = dict(model.named_parameters())
        self.state = {name: parameter.detach().float().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Follow an optimizer step."""
        self._steps += 1
        decay = min(self._decay, self._steps / (_WARM_UP_STEPS + self._steps))
        current = [parameter.detach().float() for parameter in self._parameters.values()]
        get_ema_multi_avg_fn(decay)(list(self.state.values()), current, None)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average into the model for a while."""
        kept = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._put(self.state)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.data.copy_(values[name])

    def load(self, state: dict[str, Tensor], steps: int) -> None:
        """Take over a saved average, ``steps`` updates old."""
        self._steps = steps
        for name, value in self.state.items():
            value.copy_(state[name])


def build_average(model: nn.Module, recipe: Recipe) -> Average | None:
    """Return the average that a recipe asks for (``train.ema_decay``, in fine-tuning), or None."""
    decay = recipe.train.ema_decay if isinstance(recipe, FinetuneRecipe) else 0.0
    return Average(model, decay) if decay else None
