"""Studies: several runs, what they are made of, and what they show together."""
