"""Codecs that archives and video use, as functions from arrays to bytes and back: what a tokenizer is compared with."""

from vaevq_med.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {"ClassicalCodec": "base", "find_codecs": "base", "codec_named": "base"})
