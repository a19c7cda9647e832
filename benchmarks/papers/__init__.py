"""Rows of published tables, made again by weft: `make papers`, or `python -m benchmarks.papers.NAME` for one."""
