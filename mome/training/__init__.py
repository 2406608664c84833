"""Training on Accelerate: configuration, loop, optimiser, checkpoints, validation."""
