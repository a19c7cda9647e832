"""Files and weights: written whole, verified, read without running code. Knows no run."""
