"""The proof of the weights: a recomputation that shares no code with the merge."""
