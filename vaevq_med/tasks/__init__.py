"""Downstream tasks: what somebody does with the images, by which reconstructions are judged."""
