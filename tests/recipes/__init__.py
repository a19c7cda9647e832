"""A run described by a file or by words on a command line."""
