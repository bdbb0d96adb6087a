"""The paper's experiments: what is run, the tables beside the paper's own, the tests of significance.

:func:`ecore.experiments.reproduce.reproduce` is the way in; ``ecore reproduce`` calls it.
"""
