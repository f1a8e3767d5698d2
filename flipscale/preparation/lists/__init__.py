"""Lists of image-text pairs: what they name is read a pair at a time, and a bad one is no more than that."""
