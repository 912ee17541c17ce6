"""Trainer, evaluator and their handlers on MONAI's engines."""
