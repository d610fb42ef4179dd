"""Ways to hold the policy near the base: a weight of each image's KL, and a loss on data."""
