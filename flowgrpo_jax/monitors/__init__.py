"""Monitors: figures of the evaluated pictures that a hacked reward moves, and verdicts on them.

A reward that is trained on says nothing about what it does not see. `picture_figures.py` measures
the pictures themselves, without a model, and `verdicts.py` compares what an evaluation found with
the first one of the run and says in words whether something is being lost.
"""
