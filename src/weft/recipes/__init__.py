"""A wing: a run described by a file."""
