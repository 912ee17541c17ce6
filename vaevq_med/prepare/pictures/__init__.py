"""Photographs to a data set."""
