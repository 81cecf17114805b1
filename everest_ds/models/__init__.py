"""everest_ds.models."""
