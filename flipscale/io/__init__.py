"""Files, locks, text, options and requests: everything below the model and the data."""
