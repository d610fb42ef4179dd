"""Flags, help, recipes found by name, and errors in one line."""
