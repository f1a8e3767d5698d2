"""Tasks of models that write captions, or answer questions."""
