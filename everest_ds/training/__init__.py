"""The training run: one DeepSpeed engine, one loop, checkpoints, metrics."""
