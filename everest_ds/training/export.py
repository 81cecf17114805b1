"""The weights of a run as one file that needs neither DeepSpeed nor trust: model.safetensors, fp32."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from everest_ds.config.load import to_tree
from everest_ds.config.schema import ModelConfig
from everest_ds.models.weights import CONFIG_KEY
from everest_ds.training import files
from everest_ds.training.checkpoint import AVERAGE, tensors_of
from everest_ds.training.whole import MASTER


def export_weights(checkpoint: Path, config: ModelConfig, path: Path, *, averaged: bool) -> None:
    """Write the full-precision weights of a checkpoint into one file, replaced in one move.

    Args:
        checkpoint: its folder.
        config: the model settings, stored in the file's header.
        path: the file to write.
        averaged: write the averaged weights in place of the last ones, which stay in the checkpoint.

    Raises:
        OSError, SafetensorError: the file can't be written; an older one is there still.
    """
    tensors = tensors_of(checkpoint, AVERAGE if averaged else MASTER)
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, unfinished, metadata={CONFIG_KEY: json.dumps(to_tree(config))})
    files.replace(unfinished, path)
