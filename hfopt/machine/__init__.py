"""What there is to know of the machine: processor, memory, and private files on it."""
