"""The rollout: kernels with their log-probs, ODE steps, windows, and paths that images share."""
