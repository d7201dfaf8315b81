"""A run on disk: its folder, checkpoints, data and parameters."""
