"""The command line: ``tdfx inspect``, ``merge``, ``demo``, ``verify``, ``cache``, ``completion``; one file for each.

Exit codes: 0 for success (and for two graphs that match), 1 for a proof that failed, 2 for anything that stopped the
command, with one message and no traceback unless ``--debug`` is given, and 130 after an interrupt.
"""

from tdfx.cli.root import main

__all__ = ["main"]
