"""What a run leaves to be read: logs, reports, pictures, profiles, TensorBoard's pages."""
