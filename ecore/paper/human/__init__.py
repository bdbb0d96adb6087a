"""A human evaluation as in Section 4 and Appendix I: sheets for raters, and their scores."""
