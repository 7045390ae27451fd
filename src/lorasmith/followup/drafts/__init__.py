"""Training of a draft model for speculative decoding."""
