"""Volumes to bytes and back: a trained tokenizer as a codec of whole scans."""
