"""Studies: several runs and their common results."""
