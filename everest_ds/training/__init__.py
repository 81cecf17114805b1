"""everest_ds.training."""
