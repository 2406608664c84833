"""Training data: cases, their cache on the network grid, sampling, augmentation, synthetic phantoms and CT."""
