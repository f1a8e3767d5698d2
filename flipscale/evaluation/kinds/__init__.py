"""The kinds of evaluation: one file a kind."""
