"""Starts the command line: `python cli.py --help`."""

from uda_reid.cli import main

if __name__ == "__main__":
    main()
