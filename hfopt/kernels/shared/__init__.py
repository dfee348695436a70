"""Collectives of the processes of one machine, over memory that all of them have mapped."""
