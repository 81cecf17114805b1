"""Weights in files: our own, and what the official checkpoints call our parameters.

The official attention holds ``q_bias`` and ``v_bias`` and no bias for k; timm's ``qkv.bias`` is the three in a row,
with zeros for k. A k bias shifts all logits of a query alike, which softmax ignores, so nothing is lost.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from everest_ds.config.errors import UserError, shortened, shown
from everest_ds.config.finetuning import ClassifierConfig
from everest_ds.config.json_text import parse_json
from everest_ds.config.load import build
from everest_ds.config.schema import ModelConfig
from everest_ds.models.autoencoder import MaskedAutoencoder
from everest_ds.models.classifier import VideoClassifier

WEIGHTS_FILE = "model.safetensors"
# The header entry that holds the model settings, as JSON.
CONFIG_KEY = "everest_ds.model"
# Settings that an encoder's weights come with: they make no sense to another embedding or other positions.
_SHAPE_KEYS = ("size", "tubelet", "patch", "positions")
# Settings that may change between pre-training and fine-tuning, since positions are computed.
_CLIP_KEYS = ("image_size", "frames")

_CONV_EMBED = re.compile(r"(^|\.)patch_embed\.proj\.")
_FIXED_TABLES = ("pos_embed",)
_ENCODER = "encoder."
_HEAD = "head.weight"
_NAMED = 6  # names listed one by one in a line
_LONGEST_REASON = 200
# Where official checkpoints keep their state dict.
_OFFICIAL_ENTRIES = ("model", "module")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a file holds: ``state`` under our names, ``settings`` of the model (None: the file doesn't say)."""

    file: Path
    state: dict[str, Tensor]
    settings: dict[str, Any] | None

    @property
    def classes(self) -> int | None:
        """Classes of the head, if these are a classifier's weights."""
        return len(self.state[_HEAD]) if _HEAD in self.state and self.state[_HEAD].ndim == 2 else None

    @property
    def inherited(self) -> dict[str, Any]:
        """The settings that a classifier takes over, unless told otherwise."""
        settings = self.settings or {}
        return {key: settings[key] for key in (*_SHAPE_KEYS, *_CLIP_KEYS) if key in settings}


@dataclass(frozen=True, kw_only=True)
class Match:
    """Names of parameters: loaded; of the model, but not in the file; in the file, but not of the model."""

    matched: list[str]
    missing: list[str]
    unused: list[str]

    def __str__(self) -> str:
        """Say it in one line; long lists by module."""
        told = [f"{len(self.matched)} tensors loaded"]
        if self.missing:
            told.append(f"{len(self.missing)} new ({_listed(self.missing)})")
        if self.unused:
            told.append(f"{len(self.unused)} not used ({_listed(self.unused)})")
        return ", ".join(told)


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape an official EVEREST or VideoMAE state dict (pre-training or classifier) to ours."""
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith(_FIXED_TABLES) or key.endswith(".q_bias"):
            continue
        if key.endswith(".v_bias"):
            q_bias = state.get(key.removesuffix("v_bias") + "q_bias")
            if q_bias is None or not q_bias.ndim == value.ndim == 1:
                raise UserError(f"{shown(key)}: a v_bias without its q_bias; not an official checkpoint")
            ours[key.removesuffix("v_bias") + "qkv.bias"] = torch.cat([q_bias, torch.zeros_like(value), value])
        else:
            new_key = _CONV_EMBED.sub(r"\1patch_embed.", key)
            ours[new_key] = value.flatten(1) if value.ndim == 5 else value
    return ours


def read_weights(path: str | Path, *, key: str = "weights") -> Weights:
    """Read a file of weights.

    Args:
        path: a run directory, the ``model.safetensors`` that a run writes at its end, or an official checkpoint
            (``.pth``), which is read without running code that it may hold.
        key: the setting that named the file, for messages.

    Raises:
        UserError: there is no such file, or it is neither ours nor official.
    """
    try:
        file = Path(path) / WEIGHTS_FILE if Path(path).is_dir() else Path(path)
        if not file.is_file():
            where = f"no {WEIGHTS_FILE} here; a run writes it when it ends" if Path(path).is_dir() else "no such file"
            raise UserError(f"{key}: {path}: {where}")
    except (OSError, ValueError) as error:  # a name that no file can have
        raise UserError(f"{key}: {path}: {getattr(error, 'strerror', None) or error}") from error
    if file.suffix == ".safetensors":
        return _read_ours(file, key)
    return Weights(file=file, state=_read_official(file, key), settings=None)


def load_pretrained(path: str | Path, *, device_type: str = "cpu") -> MaskedAutoencoder | VideoClassifier:
    """Return the model of a finished run, with its weights: the autoencoder, or the classifier of a fine-tuning.

    Args:
        path: a run directory, or the ``model.safetensors`` that a run writes at its end.
        device_type: where it will run; decides what ``attention="auto"`` means and in what precision tokens are scored.

    Raises:
        UserError: there is no such file, or it isn't one of ours.
    """
    weights = read_weights(path)
    if weights.settings is None:
        raise UserError(f"{weights.file}: not weights that everest_ds wrote; load_encoder takes official checkpoints")
    model: MaskedAutoencoder | VideoClassifier
    try:
        if weights.classes is None:
            model = MaskedAutoencoder(build(ModelConfig, weights.settings, "model."), device_type=device_type)
        else:
            model = VideoClassifier(build(ClassifierConfig, weights.settings, "model."), device_type=device_type)
    except UserError as error:
        raise UserError(f"{weights.file}: not weights that everest_ds wrote ({error})") from error
    _check_all(model.state_dict(), weights)
    model.load_state_dict(weights.state)
    return model


def load_encoder(model: VideoClassifier, weights: Weights, *, new_head: bool = False, key: str = "weights") -> Match:
    """Load what a file has for a classifier: a pre-trained encoder, or a whole classifier.

    Args:
        model: keeps its initial values where the file has none.
        weights: of an autoencoder, whose encoder is taken, or of a classifier.
        new_head: leave the head out.
        key: the setting that named the file, for messages.

    Raises:
        UserError: the file is for another model, its head is for another number of classes, or nothing matches.
    """
    _check_settings(model.config, weights, key)
    found = _classifier_part(weights.state)
    if new_head:
        found = {name: value for name, value in found.items() if not name.startswith("head.")}
    wanted = model.state_dict()
    matched = [name for name in wanted if name in found]
    if not matched:
        raise UserError(f"{key}: {weights.file}: none of its {len(weights.state)} tensors is a part of the classifier")
    for name in matched:
        _check_tensor(name, wanted[name], found[name], weights.file, key)
    model.load_state_dict({name: found[name] for name in matched}, strict=False)
    used = {name for name in weights.state if name.removeprefix(_ENCODER) in matched}
    return Match(
        matched=matched,
        missing=[name for name in wanted if name not in found],
        unused=[name for name in weights.state if name not in used],
    )


def _read_ours(file: Path, key: str) -> Weights:
    try:
        with safe_open(file, framework="pt") as opened:
            settings = parse_json((opened.metadata() or {})[CONFIG_KEY])
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except Exception as error:  # a header that lies can raise anything
        raise UserError(f"{key}: {file}: not weights that everest_ds wrote ({_reason(error)})") from error
    if not isinstance(settings, dict):
        raise UserError(f"{key}: {file}: not weights that everest_ds wrote (its settings are {shown(settings)})")
    return Weights(file=file, state=state, settings=settings)


def _read_official(file: Path, key: str) -> dict[str, Tensor]:
    try:
        # Official checkpoints hold their command line, a Namespace of plain values, beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # Of odd pickles, which are read or refused all the same.
            warnings.simplefilter("ignore", UserWarning)
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no checkpoint can raise anything
        raise UserError(
            f"{key}: {file}: not weights that everest_ds wrote, nor a state dict ({_reason(error)})"
        ) from error
    for entry in _OFFICIAL_ENTRIES:
        if isinstance(found, Mapping) and isinstance(found.get(entry), Mapping):
            found = found[entry]
    if not isinstance(found, Mapping) or not any(torch.is_tensor(value) for value in found.values()):
        raise UserError(f"{key}: {file}: not weights that everest_ds wrote, nor a state dict (no tensors in it)")
    try:
        return from_official({n: value for n, value in found.items() if isinstance(n, str) and torch.is_tensor(value)})
    except UserError as error:
        raise UserError(f"{key}: {file}: {error}") from error


def _reason(error: Exception) -> str:
    return shortened(" ".join(str(error).split()) or type(error).__name__, _LONGEST_REASON)


def _classifier_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as a classifier has them: of an autoencoder its encoder, of a classifier everything."""
    encoder = {name.removeprefix(_ENCODER): value for name, value in state.items() if name.startswith(_ENCODER)}
    return encoder or dict(state)


def _check_settings(config: ClassifierConfig, weights: Weights, key: str) -> None:
    for name in _SHAPE_KEYS:
        there, here = (weights.settings or {}).get(name), getattr(config, name)
        if there not in (None, here):
            raise UserError(f"{key}: {weights.file} has model.{name} = {_plain(there)}, this run {here}; leave it out")


def _plain(setting: Any) -> str:
    return setting if isinstance(setting, str) and len(setting) <= _LONGEST_REASON else shown(setting)


def _check_all(wanted: Mapping[str, Tensor], weights: Weights) -> None:
    if wanted.keys() != weights.state.keys():
        names = shortened(_listed(sorted(wanted.keys() ^ weights.state.keys())), _LONGEST_REASON)
        raise UserError(f"{weights.file}: not the tensors of the model that its settings describe: {names}")
    for name, tensor in wanted.items():
        _check_tensor(name, tensor, weights.state[name], weights.file, "weights")


def _check_tensor(name: str, wanted: Tensor, found: Tensor, file: Path, key: str) -> None:
    dense = found.layout == torch.strided and found.device.type == "cpu"
    if not (dense and found.is_floating_point()):
        raise UserError(f"{key}: {file}: {name} is not a dense tensor of floating-point numbers")
    if wanted.shape == found.shape:
        return
    if name.startswith("head.") and found.ndim == wanted.ndim:
        raise UserError(
            f"{key}: {file} has a head of {len(found)} classes, this run {len(wanted)}; with train.new_head=true the "
            "head starts afresh"
        )
    raise UserError(f"{key}: {file}: {name} is {tuple(found.shape)}, here {tuple(wanted.shape)}: another model")


def _listed(names: list[str]) -> str:
    """A few names as they are, many as their modules with counts."""
    if len(names) <= _NAMED:
        return ", ".join(names)
    modules = Counter(".".join(name.removesuffix(".weight").removesuffix(".bias").split(".")[:2]) for name in names)
    return ", ".join(f"{module}: {count}" for module, count in modules.items())
