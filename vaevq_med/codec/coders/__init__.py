"""Entropy coders: the indices of a volume to bytes and back, the same on every machine."""
