"""Slow, plain NumPy implementations that the tests compare the package with."""
