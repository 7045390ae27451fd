"""One file per LoRA variant: pure tensor maths, and a registry to read."""
