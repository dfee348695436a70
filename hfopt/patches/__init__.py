"""How the modules of a transformers model become ours: patterns, replacement classes, proof, swap, undo."""
