"""everest_ds.memory."""
