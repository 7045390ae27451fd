"""Quantized weights of a base, decoded for the proof by its own code, from the published formats."""
