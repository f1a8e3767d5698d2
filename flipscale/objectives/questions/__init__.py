"""What is learned from questions about images."""
