"""Compiled programs are kept on disk and reported; large memory pages on the CPU."""
