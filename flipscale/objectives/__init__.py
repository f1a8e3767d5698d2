"""The objectives: losses, and their demands on models and batches."""
