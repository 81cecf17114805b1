"""Arithmetic of a training step per clip: forward, backward, and what checkpointing computes again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from everest_ds.config.schema import ModelConfig
from everest_ds.models import MaskedAutoencoder, VideoClassifier, build_network
from everest_ds.models.backbone import Trunk
from everest_ds.models.flops import forward_macs

# A matrix product's backward pass is two products of its size: one for each of its operands' gradients.
_BACKWARD = 2
FLOPS_PER_MAC = 2
# Of a training step, for each multiply-accumulate of its forward pass.
STEP_FLOPS_PER_MAC = FLOPS_PER_MAC * (1 + _BACKWARD)


@dataclass(frozen=True, kw_only=True)
class StepMacs:
    """Multiply-accumulates of one clip's training step; ``recomputed``: checkpointed blocks' second forward pass."""

    forward: int
    recomputed: int

    @property
    def total(self) -> int:
        """Forward, backward and recomputation."""
        return (1 + _BACKWARD) * self.forward + self.recomputed

    @property
    def relative(self) -> float:
        """Arithmetic compared with the same step without checkpointing (1.0 to 1.33)."""
        return self.total / ((1 + _BACKWARD) * self.forward)


@lru_cache(maxsize=64)
def step_macs(config: ModelConfig) -> StepMacs:
    """Count one clip's training step on the model itself: pre-training's, or a :class:`ClassifierConfig`'s.

    Recomputed are whole blocks, as ``model.checkpointing`` says: those of the encoder, of the decoder, or both. A
    classifier has no decoder.
    """
    forward = forward_macs(build_network, config)
    with FakeTensorMode():
        model = build_network(config)
        trunks = _trunks(model)
        again = {"none": (), "full": tuple(trunks)}.get(config.checkpointing, (config.checkpointing,))
        return StepMacs(forward=forward, recomputed=sum(_trunk_macs(*trunks[name]) for name in again if name in trunks))


@lru_cache(maxsize=64)
def step_flops(config: ModelConfig) -> int:
    """Operations of one clip's training step by the published count, which rates and MFU are of.

    Two per multiply-accumulate, the backward pass twice the forward; what checkpointing computes again isn't counted.
    """
    return STEP_FLOPS_PER_MAC * forward_macs(build_network, config)


def _trunks(model: MaskedAutoencoder | VideoClassifier) -> dict[str, tuple[Trunk, int, int]]:
    """A model's stacks of blocks, each with its width and the tokens of a clip in it."""
    width, visible = model.config.row.width, model.budget.visible
    if isinstance(model, VideoClassifier):
        return {"encoder": (model.blocks, width, visible)}
    return {
        "encoder": (model.encoder.blocks, width, visible),
        "decoder": (model.decoder.blocks, model.config.decoder_width or 0, model.budget.kept),
    }


def _trunk_macs(trunk: Trunk, width: int, tokens: int) -> int:
    """Multiply-accumulates of one clip through a stack of blocks."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        trunk.run(torch.zeros(1, tokens, width))
    return counter.get_total_flops() // FLOPS_PER_MAC
