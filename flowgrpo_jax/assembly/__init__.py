"""From a config to the parts of a run: its checks, its batch plan, and the run itself."""
