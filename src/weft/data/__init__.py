"""What is trained on: datasets, splits, batches, loaders."""
