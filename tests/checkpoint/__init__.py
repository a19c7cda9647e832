"""Files and weights, without a run."""
