"""Training: losses, optimizer, the pure train step, and the loop that calls it."""
