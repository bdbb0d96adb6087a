"""The paper's tables, figures, cases, annotation and human evaluation, reproduced and compared with its own numbers."""
