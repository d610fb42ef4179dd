"""Which rewards score a prompt, and where they run: on the host or in the graph."""
