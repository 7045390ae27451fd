"""The steps of a run, by what they produce; `pipeline` puts them in order."""
