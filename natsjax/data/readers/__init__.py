"""Documents from text, JSON, Parquet, saved datasets and installed packages."""
