"""Studies of rate against distortion: tokenizers and classical codecs on the same volumes."""
