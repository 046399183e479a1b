"""Specs as data: what is refused, and what the built-in ones say."""

from __future__ import annotations

import pytest
import yaml

from toolbox.lwi.expand import expand
from toolbox.lwi.spec import builtin_specs, parse_spec, read_spec, template
from toolbox.shell.errors import BadData, MissingInput

MLP = {"fc1.weight": (6, 5), "fc1.bias": (6,), "fc2.weight": (3, 6)}
GOOD = {"fc1.weight": ["h", "-"], "fc1.bias": ["h"], "fc2.weight": ["-", "h"]}


def plan(tensors, shapes=MLP, config=None, **more):
    return expand(parse_spec({"tensors": tensors, **more}, "mine.yaml"), shapes, config or {})


def test_a_good_spec_expands():
    found = plan(GOOD)
    assert {name: group.size for name, group in found.groups.items()} == {"h": 6}
    assert found.carriers["h"] == ("fc1.weight", "fc1.bias", "fc2.weight")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"fc1.bias": None}, "leaves 1 of 3 tensors unclaimed: 'fc1.bias'"),
        ({"fc{i}.bias": ["h"]}, "tensor 'fc1.bias' is claimed twice, by 'fc1.bias' and 'fc{i}.bias'"),
        ({"fc2.weight": ["h", "-"]}, "tensor 'fc2.weight': axis 0 has 3 entries, its groups (h 6) make 6"),
        ({"fc2.weight": ["h"]}, "tensor 'fc2.weight' has 2 axes, the spec gives 1"),
        ({"fc2.weight": ["h*3", "h"]}, "tensor 'fc2.weight': axis 0 has 3 entries"),
        ({"fc1.weight": ["h", "h"]}, "axis 1 has 5 entries"),
        ({"fc1.bias": ["h/g[h]"]}, None),
        ({"fc1.bias": ["g[h]"]}, "'g[h]' must stand below a group"),
        ({"fc1.bias": ["h*x"]}, "NAME*4 is expected"),
        ({"fc1.bias": ["9h"]}, "'9h' is not the name of a group"),
        ({"fc1.bias": ["h{i}"]}, "the pattern has no counter 'i'"),
        ({"fc1.bias": ["h{q:last}"]}, "no tensor has a counter 'q'"),
        ({"fc1.bias": ["a|b"]}, "cannot be told apart"),
        ({"fc1.bias": "=nothing"}, "is tied to 'nothing', which has no axes here"),
    ],
)
def test_a_spec_that_does_not_fit_is_told_with_file_and_tensor(change, says):
    tensors = {key: axes for key, axes in {**GOOD, **change}.items() if axes is not None}
    if says is None:
        assert plan(tensors).groups["g"].shape == (6, 1)
        return
    with pytest.raises(BadData, match=r"mine\.yaml") as caught:
        plan(tensors)
    assert says in caught.value.what


def test_a_group_on_two_axes_of_one_tensor_is_refused():
    with pytest.raises(BadData, match="'w' has the group h on two axes"):
        plan({"w": ["h", "h"]}, {"w": (4, 4)})


def test_sizes_come_from_the_configuration_or_what_is_left_of_an_axis():
    shapes = {"q": (24, 7), "o": (7, 24)}
    tensors = {"q": ["kv/q[kv]/-", "r"], "o": ["r", "kv/q[kv]/-"]}
    sizes = {"kv": "n_kv", "q": "n_head / n_kv"}
    found = plan(tensors, shapes, {"n_kv": 2, "n_head": 6}, sizes=sizes)
    assert (found.groups["kv"].shape, found.groups["q"].shape) == ((2,), (2, 3))
    with pytest.raises(BadData, match="has no 'n_kv' that counts something"):
        plan(tensors, shapes, {"n_head": 6}, sizes=sizes)
    with pytest.raises(BadData, match="is 3/2, not a whole number"):
        plan(tensors, shapes, {"n_kv": 4, "n_head": 6}, sizes=sizes)
    with pytest.raises(BadData, match="not a multiple of its blocks"):
        plan(tensors, {"q": (25, 7), "o": (7, 25)}, {"n_kv": 2, "n_head": 6}, sizes=sizes)


def test_a_skip_without_a_projection_makes_two_stages_one_group():
    """ResNet-50 begins its first stage with a projection, ResNet-18 does not: there the stem shares its stream."""
    spec = next(one for one in builtin_specs() if one.name == "cifar-resnet")
    blocks = [f"stages.{s}.blocks.{b}" for s in (0, 1) for b in (0, 1)]
    shapes = {"stem.convolution.weight": (4, 3, 3, 3), "classifier.weight": (2, 6), "classifier.bias": (2,)}
    for block in blocks:
        width, inner = (4, 4) if ".0.blocks" in block else (6, 6)
        first = 4 if block != blocks[3] else 6
        shapes |= {f"{block}.conv1.weight": (inner, first, 3, 3), f"{block}.conv2.weight": (width, inner, 3, 3)}
    shapes["stages.1.blocks.0.shortcut.convolution.weight"] = (6, 4, 1, 1)
    found = expand(spec, shapes, {})
    assert "stages.0.stream" not in found.groups
    assert "stages.0.blocks.1.conv2.weight" in found.carriers["stem"]
    assert found.deepest[-1] == "stages.1.stream"
    assert found.tensors["classifier.weight"].labels
    projected = expand(spec, {**shapes, "stages.0.blocks.0.shortcut.convolution.weight": (4, 4, 1, 1)}, {})
    assert projected.carriers["stem"] == (
        "stem.convolution.weight",
        "stages.0.blocks.0.shortcut.convolution.weight",
        "stages.0.blocks.0.conv1.weight",
    )


def test_bare_layers_are_numbered_by_their_order_whatever_their_names():
    spec = next(one for one in builtin_specs() if one.name == "mlp")
    found = expand(spec, {"0.weight": (6, 5), "2.weight": (4, 6), "2.bias": (4,), "5.weight": (3, 4)}, {})
    assert {name: group.size for name, group in found.groups.items()} == {"h0": 6, "h1": 4}
    cnn = next(one for one in builtin_specs() if one.name == "cnn")
    shapes = {"conv1.weight": (4, 1, 3, 3), "conv2.weight": (5, 4, 3, 3), "bn2.weight": (5,), "fc1.weight": (7, 45),
              "fc2.weight": (2, 7)}  # fmt: skip
    found = expand(cnn, shapes, {})
    assert {name: group.size for name, group in found.groups.items()} == {"c0": 4, "c1": 5, "h0": 7}
    assert [factor.size for factor in found.tensors["fc1.weight"].axes[1][0]] == [5, 9]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tensors: {a: [x], a: [y]}\n", "mine.yaml:1: not valid YAML: 'a' stands twice"),
        ("tensors: [\n", "mine.yaml:2: not valid YAML"),
        ("tensor: {a: [x]}\n", "a mapping with `tensors` is expected"),
        ("tensors: {a: [x]}\ncolour: red\n", "$.colour: unknown"),
        ("tensors: {a: x}\n", "$.tensors.a: a list of axes is expected"),
        ("tensors: {'a{1}': [x]}\n", "a counter is {i}"),
        ("tensors: {a: [x]}\njoins: [{groups: [x]}]\n", "$.joins[0]: groups (two)"),
        ("tensors: {a: [x]}\nsizes: 3\n", "$.sizes: a mapping is expected"),
    ],
)
def test_a_file_that_is_no_spec_is_told_with_its_line_or_field(tmp_path, text, says):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(BadData) as caught:
        read_spec(path)
    assert says in caught.value.what
    with pytest.raises(MissingInput):
        read_spec(tmp_path / "none.yaml")


def test_the_template_claims_every_tensor_and_moves_nothing():
    shapes = {"deep.layers.0.w": (3, 4), "deep.layers.1.w": (3, 4), "deep.b": (3,)}
    content = yaml.safe_load(template(shapes, ["SomeModel"]))
    assert content["tensors"] == {"deep.layers.{i}.w": ["-", "-"], "deep.b": ["-"]}
    assert expand(parse_spec(content, "t"), shapes, {}).groups == {}
