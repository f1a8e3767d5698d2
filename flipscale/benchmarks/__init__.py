"""What `flipscale bench` measures."""
