"""torch.compile: what it did, whether compiled graphs ran, and on which backend."""
