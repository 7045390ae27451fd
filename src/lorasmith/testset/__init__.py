"""Test sets: build from benchmarks, hold out from training data, check that they are independent."""
