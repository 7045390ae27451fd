"""One short file per benchmark: read its public layouts, make examples, score an answer."""
