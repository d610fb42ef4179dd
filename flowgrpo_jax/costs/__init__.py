"""Memory and time of programs on a chip, and the cost of a run before it starts."""
