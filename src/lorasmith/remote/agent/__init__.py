"""What runs on the other machine."""
