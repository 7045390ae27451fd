"""Everything that touches the disk in a general way: atomic writes, digests, JSONL streams, space."""
