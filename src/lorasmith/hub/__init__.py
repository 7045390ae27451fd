"""Models of the Hugging Face hub: their names, which files count, and how they are fetched."""
