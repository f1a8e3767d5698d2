"""Sources of image-text pairs, their order, decoding, masks, tokens, and the loader of batches."""
