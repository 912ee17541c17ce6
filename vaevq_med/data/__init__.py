"""Volumes to slices, data sets of slices, and synthetic subjects."""
