"""Rows of any file that people train on, as examples: one reader for every command."""
