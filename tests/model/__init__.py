"""The decoder and its attention against the oracle, against dense masks and against themselves."""
