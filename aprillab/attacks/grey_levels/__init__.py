"""Whole grey levels in what the span attack leaves open."""
