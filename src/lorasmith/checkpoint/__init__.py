"""Model and adapter folders on disk: safetensors headers, shard index, tied weights, PEFT config, names."""
