"""The transformer and its parts: what is differentiated."""
