"""What a run leaves: metrics, bad samples, energy, and its directory."""
