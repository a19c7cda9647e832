"""NeuroMANCER's problems and trainers, compared with its own."""
