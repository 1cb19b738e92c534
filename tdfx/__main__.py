"""Run the command line as ``python -m tdfx``."""

from tdfx.cli import main

if __name__ == "__main__":
    main(prog_name="tdfx")
