"""Encoders, decoders, quantizers, discriminators and frozen feature networks."""
