"""Answers from a model: how they are decoded (``decoding``), searched for and sampled."""
