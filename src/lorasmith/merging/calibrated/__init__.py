"""Rounding fitted to the inputs of each layer, so that the fine-tune is kept."""
