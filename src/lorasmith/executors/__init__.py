"""Where chunks of work run: here, or on a cluster."""
