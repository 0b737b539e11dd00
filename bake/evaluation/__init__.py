"""Evaluation: what a model says, and how far it is from its base, on prompts that nothing saw.

`drift` and `repetition`, `facts` and `quality` are the figures, `sets` and `disjoint` what is
asked, `subject` who answers, `run` all of it together.
"""
