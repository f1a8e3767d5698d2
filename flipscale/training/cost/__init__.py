"""What a run takes: device hours, energy and money."""
