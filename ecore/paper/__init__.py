"""What the paper shows, again: its tables, figures, cases, annotation and human evaluation, beside its own numbers."""
