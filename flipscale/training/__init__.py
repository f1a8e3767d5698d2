"""How a model is trained: the recipe, the loss, the optimiser, checkpoints, tracking."""
