"""What programs take of a chip's memory and time, and what a run will cost."""
