"""Reading the golden tensors: numbers recorded from the official implementations (tests/golden/README.md)."""

from everest_ds.gpu_check.golden import FOLDER, facts, group, tensors

__all__ = ["FOLDER", "facts", "group", "tensors"]
