"""The page of a run: one HTML file that shows what was won and what was lost.

`pictures.py` writes the pictures of evaluations and of training into the work directory, and
`about.py` what a run is. `run_data.py` reads a work directory, and `page.py` makes the file.
"""
