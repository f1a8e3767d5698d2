"""What a model is worth: one file a task."""
