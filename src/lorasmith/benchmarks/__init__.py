"""Public benchmarks, one short file each: read every layout, make examples, score an answer."""
