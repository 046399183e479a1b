"""What is in a folder."""

import stat
from pathlib import Path


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def names(directory):
    return sorted(entry.name for entry in Path(directory).iterdir())
