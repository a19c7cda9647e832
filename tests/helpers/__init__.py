"""What several tests use. No test file imports another; what two of them need stands here."""
