"""Text from a model: greedy and sampled decoding, one prompt or many at once."""
