"""The small PEFT trainer behind `lorasmith train` and the demo."""
