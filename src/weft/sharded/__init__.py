"""A wing: problems in shards, for those that outgrow one GPU."""
