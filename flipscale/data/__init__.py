"""From bytes to a batch: sources, order, randomness, decoding, the loader; and the demo set."""
