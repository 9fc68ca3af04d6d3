"""aprillab against the package breaching."""
