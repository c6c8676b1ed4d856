"""Holds the Beam jobs and the tables they own."""

__version__ = "0.2.0"
