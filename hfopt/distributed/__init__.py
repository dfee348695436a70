"""Processes that have a model together."""
