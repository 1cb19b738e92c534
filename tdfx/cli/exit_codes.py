"""The exit codes of the program; 0 is success."""

FAILED = 1
"""The command ran, and its proof failed."""
STOPPED = 2
"""The command could not be carried out."""
INTERRUPTED = 130
"""The user pressed Ctrl-C; shells use this number for it."""
