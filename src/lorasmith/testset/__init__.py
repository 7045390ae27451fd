"""Test sets: build, split, check for contamination."""
