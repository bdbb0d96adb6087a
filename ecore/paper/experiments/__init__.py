"""The paper's experiments: what is run, the tables beside the paper's own, the tests of significance.

:func:`ecore.paper.experiments.reproduce.reproduce` is the way in; ``ecore reproduce`` calls it.
"""
