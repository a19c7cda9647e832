"""A wing: the same update once more, as a graph."""
