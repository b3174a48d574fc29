"""python -m xverse, and the console command `xverse`."""

import sys


def main() -> None:
    """Run the command line and leave with its exit code."""
    from xverse.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
