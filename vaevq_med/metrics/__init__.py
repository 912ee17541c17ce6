"""Reconstruction, distribution and codebook metrics."""
