"""The golden fixtures, and how far our models are from them on any device and in any precision.

``PARITY_DIR`` names another folder of fixtures than the checkout's.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from everest_ds.config.errors import UserError
from everest_ds.config.finetuning import ClassifierConfig
from everest_ds.config.schema import ModelConfig
from everest_ds.config.sizes import SIZES, Size
from everest_ds.models import MaskedAutoencoder, VideoClassifier
from everest_ds.models.importance import importance, scoring_dtype
from everest_ds.models.patches import patchify
from everest_ds.models.weights import from_official

FOLDER = Path(os.environ.get("PARITY_DIR") or Path(__file__).resolve().parents[2] / "tests/golden")
_SIZE = "golden"
Config = TypeVar("Config", bound=ModelConfig)
Tensors = dict[str, Tensor]


def facts(name: str) -> dict[str, Any]:
    """What a fixture is of.

    Raises:
        UserError: it isn't there.
    """
    try:
        read: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"PARITY_DIR: no fixture {error.filename} ({error.strerror})") from error
    return read


def tensors(name: str) -> Tensors:
    """All parts in one dictionary; tensors cut along dim 0 (X@0, X@1, ...) joined."""
    merged: Tensors = {}
    for part in facts(name)["files"]:
        merged |= load_file(FOLDER / part)
    for key in sorted({key.split("@")[0] for key in merged if "@" in key}):
        count = sum(other.startswith(f"{key}@") for other in merged)
        merged[key] = torch.cat([merged.pop(f"{key}@{i}") for i in range(count)])
    return merged


def group(merged: Tensors, prefix: str) -> Tensors:
    """The tensors below a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in merged.items() if key.startswith(prefix)}


@dataclass(kw_only=True)
class Comparison:
    """``errors`` by tensor, see :func:`error`; ``same_indices``: share of tokens chosen as the fixture has them."""

    errors: dict[str, float] = field(default_factory=dict)
    same_indices: float = 1.0

    @property
    def worst(self) -> float:
        """The largest error."""
        return largest(self.errors.values())


def largest(errors: Iterable[float]) -> float:
    """Return the largest number; what isn't a number is larger than all."""
    return max((math.inf if math.isnan(error) else error for error in errors), default=0.0)


def error(ours: Tensor, golden: Tensor) -> float:
    """The largest difference, each relative to its own number and the tensor's largest together."""
    ours, golden = ours.detach().cpu().double(), golden.double()
    if ours.shape != golden.shape:
        raise UserError(f"shape {tuple(ours.shape)} instead of {tuple(golden.shape)}")
    scale = golden.abs() + golden.abs().max()
    return float(((ours - golden).abs() / scale.clamp_min(torch.finfo(torch.float64).tiny)).max())


def autoencoder(name: str, *, device: str, dtype: torch.dtype, attention: str) -> Comparison:
    """Compare a pre-training pass, "everest_pretrain" or "videomae_pretrain", with its gradients.

    Where other tokens are chosen than the fixture's (in half precision), only importance and loss are compared.
    """
    f, golden = facts(name), tensors(name)
    is_everest = name.startswith("everest")
    keys: dict[str, Any] = {
        "attention": attention,
        "visible_ratio": 1 - f["masking_ratio" if is_everest else "mask_ratio"],
    }
    if is_everest:
        keys["keep_ratio"] = 1 - f["motion_centric_masking_ratio"]
    else:
        keys["method"] = "videomae"
    with _config(f, ModelConfig, **keys) as config:
        model = MaskedAutoencoder(config, device_type=device)
    _load(model, golden, device, dtype)
    if is_everest:
        noise, visible, target = golden["noise"], golden["visible_mask"], golden["target_mask"]
    else:  # the visible places draw the lowest numbers
        noise, visible, target = golden["mask"][:, : f["tokens_per_slot"]].float(), golden["mask"], ~golden["mask"]
    clips = golden["video_u8"].to(device)
    out = model(clips, noise.to(device))
    found = Comparison()
    if is_everest:
        found.errors["encoder positions"] = error(model.encoder.positions.table, golden["encoder_pos_embed"][0])
        found.errors["decoder positions"] = error(model.decoder.positions.table, golden["decoder_pos_embed"][0])
        found.errors["importance"] = error(_importance(model, clips, f["time_slots"]), golden["importance"])
    chosen = ((out.visible_idx, _indices(visible)), (out.target_idx, _indices(target)))
    found.same_indices = sum(float((a.cpu() == b).double().mean()) for a, b in chosen) / len(chosen)
    found.errors["loss"] = error(out.loss.reshape(1), golden["loss"])
    if found.same_indices == 1:
        found.errors["output"] = error(out.prediction, golden["output"])
        found.errors["labels"] = error(model.targets(clips, out.target_idx), golden["labels"])
        out.loss.backward()
        found.errors["gradients"] = _gradients(model, golden)
    return found


def classifier(*, device: str, dtype: torch.dtype, attention: str) -> Comparison:
    """Compare fine-tuning's pass on the kept tokens, with its gradients, and the logits of all tokens."""
    f, golden = facts("everest_finetune"), tensors("everest_finetune")
    found, clips = Comparison(), golden["video_u8"].to(device)
    for keep_ratio, key in ((1.0, "logits_no_dropping"), (1 - f["mcm_ratio"], "logits")):
        keys = {"keep_ratio": keep_ratio, "attention": attention, "classes": f["num_classes"], "drop_path": 0.0}
        with _config(f, ClassifierConfig, **keys) as config:
            model = VideoClassifier(config, device_type=device)
        _load(model, golden, device, dtype)
        logits = model(clips)
        found.errors[key] = error(logits, golden[key])
    kept = _indices(golden["keep_mask"])
    found.same_indices = float((model.kept_indices(clips).cpu() == kept).double().mean())
    loss = F.cross_entropy(logits.float(), torch.tensor(f["class_labels"], device=device))
    found.errors["loss"] = error(loss.reshape(1), golden["loss"].reshape(1))
    loss.backward()
    found.errors["gradients"] = _gradients(model, golden)
    return found


def _load(model: nn.Module, golden: Tensors, device: str, dtype: torch.dtype) -> None:
    """Give a model the fixture's weights; parameters alone are cast, as DeepSpeed does it."""
    model.load_state_dict(from_official(group(golden, "weights/")), strict=True)
    model.to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _importance(model: MaskedAutoencoder, clips: Tensor, slots: int) -> Tensor:
    embed = model.encoder.patch_embed
    dtype = scoring_dtype(embed.weight.dtype, embed.device_type)
    return importance(patchify(clips, *model.encoder.cut), embed.weight, slots, dtype)


def _gradients(model: nn.Module, golden: Tensors) -> float:
    """The largest error of any parameter's gradient, k's biases left out: the reference has none."""
    expected = from_official(group(golden, "grads/"))
    errors: list[float] = []
    if not expected:
        raise UserError("the fixture holds no gradients")
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in expected.items():
        got = ours[name]
        if got is None:
            raise UserError(f"{name} has no gradient")
        if name.endswith("qkv.bias"):  # k's third is zero but for rounding
            width = len(gradient) // 3
            pairs = [(got[:width], gradient[:width]), (got[2 * width :], gradient[2 * width :])]
        else:
            pairs = [(got, gradient)]
        errors += [error(a, b) for a, b in pairs]
    return largest(errors)


@contextlib.contextmanager
def _config(f: dict[str, Any], kind: type[Config], **keys: Any) -> Iterator[Config]:
    """The configuration of a fixture's model, whose size is a row of the table for as long."""
    # A classifier's fixture calls the same things by shorter names.
    width, depth, heads = (
        int(f[f"encoder_{key}"] if f"encoder_{key}" in f else f[key]) for key in ("embed_dim", "depth", "num_heads")
    )
    SIZES[_SIZE] = Size(
        width=width,
        depth=depth,
        heads=heads,
        decoder_width=f.get("decoder_embed_dim", width // 2),
        decoder_heads=f.get("decoder_num_heads", 1),
        patch=f["patch_size"],
        mlp_ratio=f["mlp_ratio"],
    )
    shape = {"image_size": f["img_size"], "frames": f["num_frames"], "tubelet": f["tubelet_size"]}
    try:
        yield kind(size=_SIZE, decoder_depth=f.get("decoder_depth", 1), **shape, **keys)
    finally:
        del SIZES[_SIZE]


def _indices(mask_true_is_out: Tensor) -> Tensor:
    """Ascending indices of the False entries, as many in every row."""
    return torch.stack([(~row).nonzero().flatten() for row in mask_true_is_out])
