"""Measures operators and collectives on the device at hand."""
