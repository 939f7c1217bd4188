"""``python -m d2llm``: the command line, also for launchers that start a module (``torchrun -m d2llm``)."""

from d2llm.cli.main import main

if __name__ == "__main__":
    main()
