"""The command line: `main.py` and one thin file per command."""
