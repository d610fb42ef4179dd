"""Pictures of random pixels."""

import numpy as np

PICTURES = np.random.default_rng(0).integers(0, 256, size=(16, 8, 8, 3), dtype=np.uint8)
