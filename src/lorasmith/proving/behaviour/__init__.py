"""The comparison of two models token by token."""
