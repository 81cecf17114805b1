"""The transformer trunk (timm's blocks) and the encoder that it makes with an embedding and positions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from everest_ds.config.schema import ModelConfig
from everest_ds.models.embedding import Select, SelectFrames, TubeletEmbedding, VisibleTokens
from everest_ds.models.patches import patchify
from everest_ds.models.positions import Positions
from everest_ds.tokens import TokenBudget

# The epsilon that every official model uses.
norm = partial(LayerNorm, eps=1e-6)
# Below so many tokens a CPU with these instructions is faster with materialised attention (measured: 156 and 470 tokens
# eager, 1568 fused); with AVX2 fused attention won at every length (docs/performance.md).
_CPU_FUSED_FROM_TOKENS = {"AVX512": 1000}

# Runs a block now and again in the backward pass: checkpoint(function, *tensors) -> tensor.
Checkpoint = Callable[..., Any]
recompute: Checkpoint = partial(torch_checkpoint, use_reentrant=False)


def use_fused_attention(attention: str, tokens: int, device_type: str) -> bool:
    """Resolve ``model.attention`` for a sequence length and a device type ("cpu", "cuda", ...)."""
    if attention == "auto":
        instructions = torch.backends.cpu.get_cpu_capability()
        return device_type != "cpu" or tokens >= _CPU_FUSED_FROM_TOKENS.get(instructions, 0)
    return attention == "fused"


def initialise(module: nn.Module) -> None:
    """Official initial weights: Xavier-uniform matrices, zero biases; embeddings and norms keep torch's."""
    if isinstance(module, nn.Linear) and not isinstance(module, TubeletEmbedding):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Trunk(nn.ModuleList):
    """A stack of transformer blocks, each recomputed in the backward pass if a checkpoint function is given."""

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        heads: int,
        mlp_ratio: float,
        fused: bool,
        checkpoint: Checkpoint | None = None,
        drop_path: float = 0.0,
    ) -> None:
        # As timm's calculate_drop_path_rates, which reads tensors and so doesn't work on fake ones.
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        super().__init__(
            Block(width, heads, mlp_ratio=mlp_ratio, qkv_bias=True, drop_path=rate, norm_layer=norm) for rate in rates
        )
        self.checkpoint = checkpoint
        for block in self:
            block.attn.fused_attn = fused  # type: ignore[union-attr]

    def run(self, tokens: Tensor) -> Tensor:
        """(B, K, D) to (B, K, D)."""
        for block in self:
            if self.checkpoint is not None and torch.is_grad_enabled():
                tokens = self.checkpoint(block, tokens)
            else:
                tokens = block(tokens)
        return tokens


class Encoder(nn.Module):
    """Selection of the visible tokens, their embedding and positions, trunk."""

    def __init__(
        self,
        config: ModelConfig,
        budget: TokenBudget,
        *,
        device_type: str,
        checkpoint: Checkpoint | None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        row = config.row
        self.cut = config.tubelet, config.patch_pixels
        self.patch_embed = TubeletEmbedding(*self.cut, row.width, budget=budget, device_type=device_type)
        self.positions = Positions(config.positions, budget, row.width)
        self.blocks = Trunk(
            depth=row.depth,
            width=row.width,
            heads=row.heads,
            mlp_ratio=row.mlp_ratio,
            fused=use_fused_attention(config.attention, budget.visible, device_type),
            checkpoint=checkpoint if config.checkpointing in ("encoder", "full") else None,
            drop_path=drop_path,
        )

    def forward(
        self, clips: Tensor, select: Select, scored: bool, select_frames: SelectFrames | None = None
    ) -> VisibleTokens:
        """Encode what ``select`` makes visible; no final norm.

        Args:
            clips: (B, 3, T, H, W) uint8; with frame selection, all candidate frames.
            select: chooses tokens by their importance.
            scored: whether it reads that.
            select_frames: chooses slots first; None: all of them.
        """
        patches = patchify(clips, *self.cut)
        tokens, visible_idx, target_idx, patches, slot_idx = self.patch_embed(patches, select, scored, select_frames)
        tokens = self.positions(tokens, visible_idx).to(self.patch_embed.weight.dtype)
        return VisibleTokens(self.blocks.run(tokens), visible_idx, target_idx, patches, slot_idx)
