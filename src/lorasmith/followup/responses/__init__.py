"""Answers of a model to every row of a file, resumable by row."""
