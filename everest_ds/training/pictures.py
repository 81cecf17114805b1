"""Pictures of what a model keeps of a clip and what it makes of it."""

from __future__ import annotations

from pathlib import Path

import matplotlib.figure
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from everest_ds.config.errors import UserError
from everest_ds.config.load import load_recipe
from everest_ds.data.dataset import LOST, ClipDataset
from everest_ds.data.manifest import read_manifest
from everest_ds.models import MaskedAutoencoder, load_pretrained
from everest_ds.models.patches import take, unpatchify
from everest_ds.models.targets import restore_pixels
from everest_ds.training.run_dir import RunDir

_GREY = 128
_DIM = 0.45  # brightness of kept tokens that are hidden from the encoder
_FRAMES = 6
_INCH_PER_FRAME = 1.1
_ROWS = ("original", "kept: seen bright,\nhidden dim", "reconstruction")


def draw_run(run_dir: str | Path, path: str | Path, clips: int = 3) -> None:
    """Draw original, kept tokens and reconstruction for a few clips of a finished run's own videos.

    Raises:
        UserError: the folder holds no finished pre-training run, its videos are gone, or there is nothing to draw.
    """
    if clips < 1:
        raise UserError(f"clips: at least 1 to draw, got {clips}")
    if Path(path).suffix != ".png":
        raise UserError(f"{path}: pictures are written as .png")
    model = load_pretrained(run_dir).eval()
    if not isinstance(model, MaskedAutoencoder):
        raise UserError(f"{run_dir}: a classifier, which reconstructs nothing; give the run that pre-trained it")
    recipe = load_recipe(RunDir(Path(run_dir)).config)
    manifest = recipe.data.val or recipe.data.train or ""
    dataset = ClipDataset(
        read_manifest(manifest, recipe.data.root, key="data.train"),
        recipe.data,
        frames=recipe.model.candidate_frames,
        image_size=recipe.model.image_size,
        tokens=model.budget.clip_noise,
        seed=recipe.train.seed,
        augment=False,
        attempts=1,
    )
    samples = [dataset[0, index] for index in range(min(clips, len(dataset)))]
    for sample in samples:
        if sample.index == LOST:
            raise UserError(f"video {sample.bad[0].path}: {sample.bad[0].reason}")
    batch = torch.stack([sample.clips[0] for sample in samples])
    noise = torch.stack([sample.noise[0] for sample in samples])
    draw(model, batch, noise, path)


@torch.no_grad()
def draw(model: MaskedAutoencoder, clips: Tensor, noise: Tensor, path: str | Path) -> None:
    """Write a PNG with three rows per clip (B, 3, T, H, W) uint8 and a few of the frames trained on across."""
    views, frames = trained_views(model, clips, noise)
    shown = np.linspace(0, frames.shape[1] - 1, min(_FRAMES, frames.shape[1])).round().astype(int)
    height = len(clips) * len(_ROWS)
    figure = matplotlib.figure.Figure(figsize=((len(shown) + 1.4) * _INCH_PER_FRAME, height * _INCH_PER_FRAME))
    axes = figure.subplots(height, len(shown), squeeze=False)
    for row in range(height):
        pixels = _channels_last(views[row % len(_ROWS)][row // len(_ROWS)])
        for column, frame in enumerate(shown):
            axis = axes[row, column]
            axis.imshow(pixels[frame], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if row % len(_ROWS) == 0:
                axis.set_title(f"frame {frames[row // len(_ROWS), frame]}", fontsize=8)
        axes[row, 0].set_ylabel(_ROWS[row % len(_ROWS)], rotation=0, ha="right", va="center", fontsize=8)
    figure.tight_layout(pad=0.4)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def trained_views(model: MaskedAutoencoder, clips: Tensor, noise: Tensor) -> tuple[list[Tensor], Tensor]:
    """Views of the clips trained on: as they are; dropped tokens grey and hidden ones dimmed; hidden ones predicted.

    Args:
        model: the autoencoder.
        clips: (B, 3, T, H, W) uint8; with frame selection, all candidate frames.
        noise: as the model takes it.

    Returns:
        Three (B, 3, T, H, W) uint8 and the (B, T) numbers that their frames have in ``clips``, all on its device.
    """
    out = model(clips, noise)
    cut, budget = model.encoder.cut, model.budget
    patches = model.patches(clips, out.slot_idx)
    kept = torch.full_like(patches, _GREY)
    made = torch.full_like(patches, _GREY)
    hidden = take(patches, out.target_idx)
    seen = take(patches, out.visible_idx)
    for canvas, targets in (
        (kept, (hidden * _DIM).to(torch.uint8)),
        (made, restore_pixels(out.prediction, patches, out.target_idx)),
    ):
        _put(canvas, out.visible_idx, seen)
        _put(canvas, out.target_idx, targets)
    grid = (budget.slots, budget.rows, budget.columns)
    frames = torch.arange(clips.shape[2], device=clips.device).unflatten(0, (-1, cut[0])).expand(len(clips), -1, -1)
    if out.slot_idx is not None:
        frames = take(frames, out.slot_idx)
    return [unpatchify(view, grid, *cut) for view in (patches, kept, made)], frames.flatten(1)


def _put(canvas: Tensor, index: Tensor, patches: Tensor) -> None:
    canvas.scatter_(1, index[..., None, None].expand_as(patches), patches)


def _channels_last(clip: Tensor) -> NDArray[np.uint8]:
    return clip.permute(1, 2, 3, 0).cpu().numpy()
