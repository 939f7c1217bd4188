"""The program ``d2llm``, also as ``python -m d2llm`` for launchers that start a module (``torchrun -m d2llm``)."""

import sys


def main() -> None:
    """Import the command line and run it; Ctrl-C ends the program at once, also during the import."""
    try:
        from d2llm.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
