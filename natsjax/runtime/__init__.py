"""The process, not the model: several processes, signals, flags, files, progress, compiled programs, chips."""
