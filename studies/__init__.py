"""Measurements whose output is committed in data/results/."""
