"""What `flipscale bench gpu` measures and tests on a node of GPUs."""
