"""Recipes of the other algorithms on the model in the box: `--config algorithms/nft`."""
