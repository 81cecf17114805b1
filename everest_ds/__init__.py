"""EVEREST and VideoMAE pre-training under DeepSpeed."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["create_model", "load_pretrained"]


def __getattr__(name: str) -> Any:
    # torch and timm load on first use, so that the planner's and the configuration's imports stay light.
    if name in __all__:
        from everest_ds import models  # noqa: PLC0415

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
