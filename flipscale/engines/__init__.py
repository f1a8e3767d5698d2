"""Where a model trains: launch, engines, optimisers, checkpoints."""
