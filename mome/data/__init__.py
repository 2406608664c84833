"""Data sets, the cache on the network grid, sampling, augmentation and the synthetic phantom."""
