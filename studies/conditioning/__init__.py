"""Why sinusoids resist the span attack."""
