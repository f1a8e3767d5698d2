"""From a recipe to the first step: the data, the processes, the checkpoint and the engine."""
