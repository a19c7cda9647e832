"""How fast weft is, next to what people use today. `make bench` runs everything; see `python -m benchmarks --help`."""
