"""The audit of training data: what is in it, said in figures and pictures."""
