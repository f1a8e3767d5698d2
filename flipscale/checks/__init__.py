"""Checks and measurements of a node of GPUs, for `flipscale bench gpu`."""
