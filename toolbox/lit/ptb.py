"""The tokens that captions are usually scored by: Stanford's Penn Treebank tokenizer, punctuation dropped.

The jar comes with the package ``pycocoevalcap`` (found, never imported) and runs on the user's Java. No numpy.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from toolbox.shell.errors import MissingInput, Unavailable

_JAR = "stanford-corenlp-3.4.1.jar"
_DROPPED = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
"""What the COCO caption evaluation takes out."""
_INSTEAD = "or --tokenizer simple"


def _jar() -> Path:
    spec = importlib.util.find_spec("pycocoevalcap")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    for place in places:
        if (path := Path(place) / "tokenizer" / _JAR).is_file():
            return path
    raise MissingInput(
        "--tokenizer ptb: pycocoevalcap is not installed", f"pip install --no-deps pycocoevalcap==1.2, {_INSTEAD}"
    )


def ptb_tokens(texts: Sequence[str]) -> list[list[str]]:
    """The tokens of each text, in lower case.

    Raises: MissingInput (66) without the package or without Java, Unavailable (69) where it fails.
    """
    jar, java = _jar(), shutil.which("java")
    if java is None:
        raise MissingInput("--tokenizer ptb: there is no java on the PATH", f"install a Java runtime, {_INSTEAD}")
    if not texts:
        return []
    words = [java, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    lines = "".join(" ".join(text.split()) + "\n" for text in texts)  # a line a text, whatever it holds
    done = subprocess.run(
        [*words, "-encoding", "UTF-8"], input=lines.encode("utf-8", "replace"), capture_output=True, check=False
    )
    found = done.stdout.decode("utf-8", "replace").split("\n")[:-1]
    if done.returncode or len(found) != len(texts):
        said = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["nothing"]
        raise Unavailable(f"--tokenizer ptb: java fails and says {said[0][:200]}", f"check {java}, {_INSTEAD}")
    return [[token for token in line.split() if token not in _DROPPED] for line in found]
