"""Vector quantizers, one file a method."""
