"""The audit of training data."""
