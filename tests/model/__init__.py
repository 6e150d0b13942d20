"""Tests that compare the decoder with the oracle, with dense masks, and with itself."""
