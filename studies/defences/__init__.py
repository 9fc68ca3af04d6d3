"""Defences that hold, and what they cost: accuracy, reconstruction, identification."""
