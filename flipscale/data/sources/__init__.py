"""What is read: tar shards, here or remote, `datasets`, and mixtures of them."""
