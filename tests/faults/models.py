"""Model directories that are torn, pickled, of another architecture, or bring code, for every command that loads."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.contract.commands import Case, lines
from tests.faults.bench import Bench, artefacts, complaint

LOADS = {"coca-eval", "dull-eval", "lit-build", "lit-inspect", "longer-score", "lwi-eval", "lwi-fuse"}
"""Commands that load a model though their case has no ``--model`` of the launchable kind."""
WITHOUT = {"dull-train", "legit-loop", "lit-eval", "legit-target", "lwi-train", "longer-train"}
"""Commands that may load one and whose short run makes its own."""


def loads(case: Case) -> bool:
    """Whether the command's short run reads a model directory."""
    return case.model or case.name in LOADS


class Trap:
    """What a pickle would do: leave a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def _weights(model: Path) -> Path:
    return sorted(model.glob("*.safetensors"))[0]


def _config(model: Path, **change: object) -> None:
    path = model / "config.json"
    config = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def _half(model: Path, mark: Path) -> None:
    path = _weights(model)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _in_the_header(model: Path, mark: Path) -> None:
    path = _weights(model)
    path.write_bytes(path.read_bytes()[:40])


def _empty(model: Path, mark: Path) -> None:
    _weights(model).write_bytes(b"")


def _lying_length(model: Path, mark: Path) -> None:
    _weights(model).write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def _none(model: Path, mark: Path) -> None:
    for path in model.glob("*.safetensors"):
        path.unlink()


def _pickle_beside(model: Path, mark: Path) -> None:
    _none(model, mark)
    with zipfile.ZipFile(model / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Trap(mark)))


def _pickle_within(model: Path, mark: Path) -> None:
    _weights(model).write_bytes(pickle.dumps(Trap(mark)))


def _another_width(model: Path, mark: Path) -> None:
    """Every size in the configuration is another one: its weights are those of some other model."""
    path = model / "config.json"
    config = json.loads(path.read_text())

    def grown(value: object, key: str = "") -> object:
        if isinstance(value, dict):
            return {name: grown(one, name) for name, one in value.items()}
        if key in ("hidden_size", "dim", "d_model", "n_embd", "intermediate_size"):
            return 2 * value  # type: ignore[operator]
        if key == "widths":
            return [2 * one for one in value]  # type: ignore[attr-defined]
        return value

    path.write_text(json.dumps(grown(config)))


def _unknown(model: Path, mark: Path) -> None:
    _config(model, model_type="no_such_model", architectures=["NoSuchModel"], name="no-such-net")


def _no_configuration(model: Path, mark: Path) -> None:
    (model / "config.json").unlink()


def _torn_configuration(model: Path, mark: Path) -> None:
    (model / "config.json").write_text('{"model_type": "lla')


def _deep_configuration(model: Path, mark: Path) -> None:
    (model / "config.json").write_text('{"a": ' * 50_000)


def _list_configuration(model: Path, mark: Path) -> None:
    (model / "config.json").write_text("[]")


def _code(model: Path, mark: Path) -> None:
    names = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    _config(model, model_type="evil", auto_map=names)
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")


def _another(model: Path, mark: Path) -> None:
    """A model of the same file names that is quite another thing: one tensor of no known name."""
    header = json.dumps({"blob": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    _weights(model).write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0\0\0")


DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "weights cut in half": _half,
    "weights cut in their header": _in_the_header,
    "weights without a byte": _empty,
    "a header that claims 4 EiB": _lying_length,
    "no weights": _none,
    "pickled weights": _pickle_beside,
    "a pickle by the name of weights": _pickle_within,
    "weights of another model": _another,
    "another width": _another_width,
    "an unknown architecture": _unknown,
    "no configuration": _no_configuration,
    "half a configuration": _torn_configuration,
    "an endless configuration": _deep_configuration,
    "a list as configuration": _list_configuration,
    "code of its own": _code,
}
"""Each is given a model directory, and a place where code that runs would leave a mark."""


def absent(bench: Bench, case: Case) -> Iterator[str]:
    """A model that is not there, a pickle, a folder without one, a name of the hub where there is no network."""
    (bench.root / "evil.pt").write_bytes(b"\x80\x04.")
    (bench.root / "folder").mkdir()
    for name, code in [
        (bench.root / "missing", 66), (bench.root / "evil.pt", 65), (bench.root / "folder", 66), ("some/model", 69),
    ]:  # fmt: skip
        done = bench.run(case, "--model", name)
        told = complaint(case, done.code, done.out, done.err)
        assert done.code == code, (name, done.err)
        assert str(name) in told
        yield str(code)


def damaged(bench: Bench, case: Case) -> Iterator[str]:
    """One damage at a time: 65 or 66 with the file's name, before anything is made, and nothing in it is run."""
    expected = None
    for number, (name, damage) in enumerate(DAMAGES.items()):
        folder = bench.folder(f"damage{number}")
        words = bench.words(case, folder)
        words, model = victim(words, folder)
        mark = folder / "mark"
        damage(model, mark)
        done = bench.tool(case.name, *words, stdin=lines(case.good))
        assert not mark.exists(), f"{name}: its code was run"
        if done.code == 0:
            if expected is None:
                expected = bench.run(case, folder=bench.folder("whole")).out, artefacts(case, bench.folder("whole"))
            assert (done.out, artefacts(case, folder)) == expected, f"{name}: taken, and the result is another"
        else:
            told = complaint(case, done.code, done.out, done.err)
            assert done.code in (2, 65, 66), (name, done.err)
            assert model.name in told or str(folder) in told or "'blob'" in told, (name, told)
            assert not (folder / "out").exists()
        yield name


def victim(words: list[str], folder: Path) -> tuple[list[str], Path]:
    """The arguments with their last model directory replaced by a copy in ``folder``, and that copy."""
    for place, word in reversed(list(enumerate(words))):
        path = Path(word)
        if path.is_dir() and (path / "config.json").is_file():
            if folder in path.parents:
                return words, path
            copied = folder / "victim"
            shutil.copytree(path, copied)
            return [*words[:place], str(copied), *words[place + 1 :]], copied
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and any(path.glob("*.safetensors")))
    assert inside, "the short run names no model directory"
    return words, inside[0]
