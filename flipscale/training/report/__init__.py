"""What a run tells people while it trains: its lines, and silence from other packages."""
