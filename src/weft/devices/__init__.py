"""Where training runs: Fabric, precision, processes, seeds, signals."""
