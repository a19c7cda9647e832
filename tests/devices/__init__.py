"""Where it is trained: Fabric, one process or many, whole or in shards, and the signals that end it."""
