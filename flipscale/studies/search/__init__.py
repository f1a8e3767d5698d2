"""The search for the best path through a budget of time, by successive halving."""
