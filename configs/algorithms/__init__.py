"""Recipes of the other algorithms on the bundled model: `--config algorithms/nft`."""
