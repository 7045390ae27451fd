"""Running models: load, chat templates and token boundaries, batches, forward, generate."""
