"""Slow, plain NumPy implementations that the tests hold the package against."""
