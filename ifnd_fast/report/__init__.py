"""A run's page and its pictures."""
