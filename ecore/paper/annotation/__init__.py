"""Several emotions a dialogue, instead of the corpus's one: annotators, screening, review, agreement
(Appendix H of the paper)."""
