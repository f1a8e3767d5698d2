"""The models that can be evaluated beside ours: one file a kind."""
