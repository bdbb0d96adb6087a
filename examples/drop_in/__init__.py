"""A Transformer and a graph network in other people's habits, before and after three changed imports."""
