"""A context that a model is trained or measured on, decoded for people."""
