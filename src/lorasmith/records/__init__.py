"""Frozen, versioned records that pass between stages and land on disk as JSON: one file per area."""
