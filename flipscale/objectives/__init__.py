"""What is learned: the losses and what they need."""
