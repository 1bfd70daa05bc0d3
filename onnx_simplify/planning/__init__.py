"""Decisions that change speed and size, never the function."""
