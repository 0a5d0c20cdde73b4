"""Completions: the loops and servers that sample them, and how many at a time."""
