"""A decoder as a flat program: built from its modules, proven against them, run in one launch."""
