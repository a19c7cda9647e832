"""The loop, and the only room that knows it: trainer, run, phases, resuming, saving."""
