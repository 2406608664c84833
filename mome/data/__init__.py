"""Training data: folders of cases, their cache on the network grid, sampling, augmentation, synthetic phantoms."""
