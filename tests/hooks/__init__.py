"""Hooks that are asked for by name."""
