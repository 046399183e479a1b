"""Entry point of a worker process: ``python -m toolbox.shell.worker COMMAND ARGUMENTS...``."""

from __future__ import annotations

import importlib
import sys


def main() -> None:
    """Run the command named by the first argument with the rest."""
    command = sys.argv[1]
    del sys.argv[1]
    importlib.import_module(f"toolbox.commands.{command.replace('-', '_')}").main()


if __name__ == "__main__":
    main()
