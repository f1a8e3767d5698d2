"""Losses that train a model class of their own."""
