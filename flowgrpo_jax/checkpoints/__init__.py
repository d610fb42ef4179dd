"""What a run saves of its training, and how a saved policy is read."""
