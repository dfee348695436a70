"""Vectors: types, loads and stores, functions and products of small tiles."""
