"""Training steps: their time, what each improvement is worth, where the time goes, how it grows."""
