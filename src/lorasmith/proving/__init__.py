"""Two independent proofs: of the weights, and of the behaviour."""
