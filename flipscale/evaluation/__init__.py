"""Evaluations of trained models: a file for each kind."""
