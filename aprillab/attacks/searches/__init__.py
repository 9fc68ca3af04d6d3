"""Gradient matching: look for pictures whose gradient is the one that was shared."""
