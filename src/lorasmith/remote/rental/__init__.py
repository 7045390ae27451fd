"""Rented machines: search, rent, watch, end, under caps on money."""
