"""Answers: their time by word, what each improvement is worth, where the time goes, how it grows."""
