"""A run on disk: its folder, checkpoints, data, parameters and the metrics that it logs."""
