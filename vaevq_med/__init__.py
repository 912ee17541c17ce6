"""Discrete visual tokenizers for medical images, around VAEVQ (arXiv 2511.06863), on MONAI."""

__version__ = "0.1.0"
