"""Attention over the cache: one new token a row (`decode`), many (`prefill`)."""
