"""The same update as a graph."""
