"""Fewer bits: several ways to quantize a merged model, measured beside each other."""
