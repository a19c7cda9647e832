"""Runs and sweeps as jobs of a real SLURM."""
