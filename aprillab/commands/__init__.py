"""The command line ``aprillab``."""
