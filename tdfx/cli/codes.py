"""What the program says by its exit code; 0 is success."""

FAILED = 1
"""The command ran, and what it was to prove does not hold."""
STOPPED = 2
"""The command could not be carried out."""
INTERRUPTED = 130
"""Somebody pressed Ctrl-C; the number that shells give to it."""
