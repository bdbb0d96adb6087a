"""Two commits side by side: operators and training steps, interleaved."""
