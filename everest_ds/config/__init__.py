"""Settings: what a run can be told, read from YAML, overrides and DeepSpeed JSON, and checked."""
