"""The paper's experiments: their runs, the tables next to the paper's own, the tests of significance.

:func:`ecore.paper.experiments.reproduce.reproduce` is the entry point; ``ecore reproduce`` calls it.
"""
