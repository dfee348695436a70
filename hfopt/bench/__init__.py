"""The benchmark suite: what is measured, how, and the tables that it prints."""
