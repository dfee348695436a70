"""Compilation: options, the disk cache of machine code, threads and the parallel loop."""
