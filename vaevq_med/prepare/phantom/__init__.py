"""Synthetic subjects."""
