"""The model sizes, as rows of one table. No torch: the planner and the configuration read it too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Size:
    """One row: the encoder's shape, its patch, and the decoder that goes with it by default.

    Widths are in channels, ``patch`` in pixels; ``mlp_ratio`` is hidden width / width.
    """

    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_heads: int
    patch: int = 16
    mlp_ratio: float = 4.0


# Encoder shapes: ViT (Dosovitskiy et al. 2021, Table 1) for B/L/H, DeiT (Touvron et al. 2021) for S,
# VideoMAE V2 (Wang et al. 2023, Table 8) for g. Decoder widths and heads of S to H: official EVEREST models.
# The g decoder keeps half the width, with 64 channels a head. vit_micro is ours, for tests and the demo.
SIZES: dict[str, Size] = {
    "vit_micro": Size(width=96, depth=4, heads=3, decoder_width=48, decoder_heads=3, patch=8),
    "vit_small": Size(width=384, depth=12, heads=6, decoder_width=192, decoder_heads=3),
    "vit_base": Size(width=768, depth=12, heads=12, decoder_width=384, decoder_heads=6),
    "vit_large": Size(width=1024, depth=24, heads=16, decoder_width=512, decoder_heads=8),
    "vit_huge": Size(width=1280, depth=32, heads=16, decoder_width=640, decoder_heads=8),
    "vit_giant": Size(width=1408, depth=40, heads=16, decoder_width=704, decoder_heads=11, patch=14, mlp_ratio=48 / 11),
}
