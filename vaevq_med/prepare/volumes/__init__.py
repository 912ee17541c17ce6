"""Volumes to slices."""
