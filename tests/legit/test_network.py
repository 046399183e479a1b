"""Networks: read, kept, sampled."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.server import ROOT, environment
from toolbox.legit.network import draw_rows, list_networks, packaged_networks, parse_bif, read_network
from toolbox.shell.errors import BadData, MissingInput

BIF = """network unknown {
}
variable rain {
  type discrete [ 2 ] { yes, no };
}
variable grass {
  type discrete [ 3 ] { dry, damp, wet };
}
probability ( rain ) {
  table 0.3, 0.7;
}
probability ( grass | rain ) {
  (yes) 0.0, 0.4, 0.6;
  (no) 0.9, 0.1, 0.0;
}
"""


def exact(network, target: int | None) -> np.ndarray:
    """P(second state) of each binary variable by enumeration, under do(target uniform) where one is given."""
    size = len(network.names)
    total = np.zeros(size)
    for row in itertools.product(range(2), repeat=size):
        weight = 1.0
        for node in range(size):
            if node == target:
                weight *= 0.5
                continue
            place = 0
            for parent in network.parents[node]:
                place = place * 2 + row[parent]
            weight *= network.tables[node][place, row[node]]
        total += weight * np.array(row)
    return total


def test_marginals_of_asia_are_those_of_enumeration_observed_and_under_interventions():
    network = read_network("asia")
    for target in (None, *range(8)):
        rows = draw_rows(network, 20_000, 5, target)
        wanted = exact(network, target)
        sigma = np.sqrt(np.maximum(wanted * (1 - wanted), 1e-9) / len(rows))
        assert (np.abs(rows.mean(0) - wanted) <= 4 * sigma + 1e-9).all(), target


def test_what_does_not_descend_from_the_target_is_the_same_for_the_same_noise():
    network = read_network("asia")
    noise = np.random.default_rng(0).random((500, 8))
    plain, lung = network.sample(noise), network.sample(noise, network.names.index("lung"))
    changed = {network.names[n] for n in np.flatnonzero((plain != lung).any(0))}
    assert changed == {"lung", "either", "xray", "dysp"}
    fixed = network.sample(noise, network.names.index("smoke"), 1)
    assert set(fixed[:, network.names.index("smoke")].tolist()) == {1}


def test_rows_depend_on_seed_target_and_occurrence_alone_and_more_rows_begin_with_the_same():
    network = read_network("asia")
    assert (draw_rows(network, 32, 1, 2, 0)[:16] == draw_rows(network, 16, 1, 2, 0)).all()
    others = [draw_rows(network, 32, 1, 2, 1), draw_rows(network, 32, 2, 2, 0), draw_rows(network, 32, 1, 3, 0)]
    assert all((draw_rows(network, 32, 1, 2, 0) != other).any() for other in others)
    assert list(network.names) == sorted(network.names)


def test_a_bif_text_is_read_with_its_tables_and_zero_cells_never_come():
    network = parse_bif(BIF, "x.bif")
    assert network.names == ("grass", "rain")
    assert network.tables[0].tolist() == [[0.0, 0.4, 0.6], [0.9, 0.1, 0.0]]
    rows = draw_rows(network, 3000, 0)
    pairs = {tuple(row) for row in rows.tolist()}
    assert pairs == {(1, 0), (2, 0), (0, 1), (1, 1)}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("0.3, 0.7", "0.3, 0.6", "does not sum to 1"),
        ("( grass | rain )", "( grass | snow )", "not a network that can be read"),
        ("probability", "likelihood", "not a network in the BIF format"),
    ],
)
def test_what_is_no_network_is_said_in_one_line(old, new, says):
    with pytest.raises(BadData, match=says):
        parse_bif(BIF.replace(old, new), "x.bif")


def test_networks_are_found_and_listed_without_pgmpy_and_torch_once_they_are_kept(tmp_path):
    read_network("asia")
    code = (
        "import sys; from toolbox.commands.legit_sim import main\n"
        "try: main(['--network', 'asia', '-n', '3'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'pgmpy', 'pandas') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "[]"
    assert len(done.stdout.splitlines()) == 3
    assert {"name": "alarm", "nodes": 37, "edges": 46, "max_states": 4} in list_networks()
    with pytest.raises(MissingInput, match="no such network"):
        read_network(str(tmp_path / "none.bif"))


def test_a_damaged_cache_is_parsed_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLBOX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "g.bif").write_text(BIF)
    parsed = parse_bif(BIF, "g.bif")
    monkeypatch.setattr("toolbox.legit.network.parse_bif", lambda text, file: parsed)
    first = read_network(str(tmp_path / "g.bif"))
    kept = next((tmp_path / "cache").rglob("*.safetensors"))
    kept.write_bytes(b"\0" * 9)
    again = read_network(str(tmp_path / "g.bif"))
    assert again.names == first.names
    assert os.path.getsize(kept) > 100


@pytest.mark.slow
def test_the_tables_of_every_packaged_network_sum_to_one():
    small = {one["name"] for one in list_networks() if one["nodes"] <= 76 and one["max_states"] <= 21}
    for name in sorted(small & set(packaged_networks())):
        network = read_network(name)
        assert all(np.allclose(table.sum(1), 1) for table in network.tables), name
