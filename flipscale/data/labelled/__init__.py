"""Images with class numbers as training samples, and how they are varied."""
