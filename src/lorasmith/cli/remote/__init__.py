"""The commands that work on other machines, by ssh or rented."""
