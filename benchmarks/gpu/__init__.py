"""What weft promises on a GPU, asked of one: `make gpu`, or `PYTHONPATH=src python -m benchmarks.gpu`.

Needs Python 3.11 with torch, lightning, numpy, rich, tensorboard, matplotlib, jsonargparse and cloudpickle; nothing of
NeuroMANCER's. `--list` says what would run and how long it takes, `--device cpu --small` rehearses it without a GPU.
"""
