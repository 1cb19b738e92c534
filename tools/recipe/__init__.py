"""The parts of ``tools/train.py`` and ``tools/paper_table.py``: one idea a file."""
