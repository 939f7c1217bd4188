"""The program ``d2llm``, also as ``python -m d2llm`` for launchers that start a module (``torchrun -m d2llm``)."""

import signal
import sys


def main() -> None:
    """Import the command line and run it; Ctrl-C ends the program at once, also during the import.

    A verb stops in order at the first Ctrl-C. Afterwards another one ends the process as it is, without a traceback.
    """
    try:
        from d2llm.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    try:
        run()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()
