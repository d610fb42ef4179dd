"""What holds the policy near the base: the weight of each image's KL, and data."""
