"""Formats of quantized weights: which tensors make one weight, its exact numbers, its grid, its codes."""
