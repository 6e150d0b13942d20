"""Training: losses, optimizer, the pure train step, the loop around it."""
