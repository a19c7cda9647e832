"""The house itself: its shape, its README, its examples, its benchmarks, and the bits it computes."""
