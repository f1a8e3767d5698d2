"""The columns of a batch: each file makes one kind."""
