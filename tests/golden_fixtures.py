"""Reading the golden tensors: numbers recorded from the official implementations (tests/golden/README.md)."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

FOLDER = Path(os.environ.get("PARITY_DIR") or Path(__file__).parent / "golden")


def facts(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def tensors(name: str) -> dict[str, torch.Tensor]:
    """All parts in one dictionary; tensors cut along dim 0 (X@0, X@1, ...) joined."""
    merged: dict[str, torch.Tensor] = {}
    for part in facts(name)["files"]:
        merged |= load_file(FOLDER / part)
    cut = sorted({key.split("@")[0] for key in merged if "@" in key})
    for key in cut:
        count = sum(other.startswith(f"{key}@") for other in merged)
        merged[key] = torch.cat([merged.pop(f"{key}@{i}") for i in range(count)])
    return merged


def group(merged: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in merged.items() if key.startswith(prefix)}
