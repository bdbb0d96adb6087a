"""The paper's tables, figures, cases, annotation and human evaluation, remade beside its own numbers."""
