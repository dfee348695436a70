"""Checkpoints: read, renamed, filled into models, written; and those of other tools."""
