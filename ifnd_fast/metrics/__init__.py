"""Figures; no commands."""
