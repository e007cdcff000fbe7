"""Training a run, and reading what one saved."""
