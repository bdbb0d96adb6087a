"""Dialogues in the subwords of a pre-trained tokenizer, with the intensities of their words."""
