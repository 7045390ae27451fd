"""Validation: loss and perplexity per token, aggregation with intervals, task accuracy."""
