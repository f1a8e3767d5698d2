"""Sources of image-text pairs: local and remote tar shards, `datasets`, and mixtures of them."""
