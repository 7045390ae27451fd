"""The merge: plan (which tensor gets what), rounding, execute (stream the shards)."""
