"""Campaigns: many kills, flipped bits, malformed inputs and bad places to write, each of which must lose nothing."""
