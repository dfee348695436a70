"""Linear layers: few rows, tiles of many, and both over quantised weights."""
