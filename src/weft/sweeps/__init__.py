"""A wing: many runs, one search."""
