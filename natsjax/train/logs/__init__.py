"""What is written and shown of the steps of a run."""
