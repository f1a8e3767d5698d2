"""The training loop: a step, what the processes agree on, and what happens between steps."""
