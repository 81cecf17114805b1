"""everest_ds.data."""
