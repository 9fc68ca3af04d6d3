"""Attacks side by side on the same updates: a CSV row for each, a table, figures."""
