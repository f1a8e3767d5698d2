"""What surrounds the training loop: complete recipes, evaluations in training, and the end of a run."""
