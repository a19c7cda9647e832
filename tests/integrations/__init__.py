"""Objects of other libraries in weft's loop."""
