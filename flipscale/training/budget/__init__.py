"""The time budget of a run, and where a run is in its schedule."""
