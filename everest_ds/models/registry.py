"""Models by name: our own ``create_model`` and the same sizes in timm's registry."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from timm.models import register_model

from everest_ds.config.errors import UserError
from everest_ds.config.finetuning import ClassifierConfig
from everest_ds.config.load import build
from everest_ds.config.schema import ModelConfig
from everest_ds.config.sizes import SIZES
from everest_ds.models.autoencoder import MaskedAutoencoder
from everest_ds.models.backbone import Checkpoint
from everest_ds.models.classifier import VideoClassifier


def create_model(
    size: str = "vit_small",
    *,
    method: str = "everest",
    device_type: str = "cpu",
    checkpoint: Checkpoint | None = None,
    **model_keys: Any,
) -> MaskedAutoencoder:
    """Return a pre-training model.

    Args:
        size: a row of :data:`everest_ds.config.sizes.SIZES`, such as "vit_base".
        method: "everest" or "videomae".
        device_type: where it will run; decides what ``attention="auto"`` means and in what precision tokens are scored.
        checkpoint: activation-checkpointing function; None means torch's.
        model_keys: any other key of the recipe's ``model`` group.

    Raises:
        UserError: an unknown key or a setting that can't be.
    """
    config = build(ModelConfig, {"size": size, "method": method, **model_keys}, "model.")
    return MaskedAutoencoder(config, device_type=device_type, checkpoint=checkpoint)


def build_network(
    config: ModelConfig, *, device_type: str = "cpu", checkpoint: Checkpoint | None = None
) -> MaskedAutoencoder | VideoClassifier:
    """Return the network of a configuration: the classifier of a :class:`ClassifierConfig`, else the autoencoder.

    Raises:
        UserError: the network can't be built so.
    """
    if isinstance(config, ClassifierConfig):
        return VideoClassifier(config, device_type=device_type, checkpoint=checkpoint)
    return MaskedAutoencoder(config, device_type=device_type, checkpoint=checkpoint)


def _autoencoder_entry(size: str, method: str) -> Callable[..., MaskedAutoencoder]:
    def entry(**options: Any) -> MaskedAutoencoder:
        return create_model(size, method=method, **_without_timm(options))

    return _named(entry, f"{method}_{size}_pretrain", f"{method} autoencoder, {size}.")


def _classifier_entry(size: str) -> Callable[..., VideoClassifier]:
    def entry(num_classes: int = 1000, drop_path_rate: float = 0.0, **options: Any) -> VideoClassifier:
        keys = {"size": size, "classes": num_classes, "drop_path": drop_path_rate, **_without_timm(options)}
        return VideoClassifier(build(ClassifierConfig, keys, "model."))

    return _named(entry, f"everest_{size}", f"Video classifier with ReRo token dropping, {size}.")


def _without_timm(options: dict[str, Any]) -> dict[str, Any]:
    """Drop what timm passes to every model of its own."""
    if options.pop("pretrained", False):
        raise UserError("pretrained=True: no weights are published under these names; use everest_ds.load_pretrained")
    return {k: v for k, v in options.items() if not k.startswith("pretrained_") and k != "cache_dir"}


def _named(entry: Callable[..., Any], name: str, doc: str) -> Callable[..., Any]:
    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = doc
    entry.__module__ = __name__
    setattr(sys.modules[__name__], name, register_model(entry))
    return entry


for _size in SIZES:
    _classifier_entry(_size)
    for _method in ("everest", "videomae"):
        _autoencoder_entry(_size, _method)
