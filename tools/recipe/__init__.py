"""What ``tools/train.py`` and ``tools/paper_table.py`` are made of: one idea a file."""
