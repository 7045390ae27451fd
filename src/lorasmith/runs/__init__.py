"""A run: its steps, their order, its folder, and what became of them."""
