"""Which patches and words a batch keeps: the kinds of masks, and their randomness keyed by sample."""
