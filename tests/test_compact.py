"""Compact files: bit for bit there and back, small, and clear about what they are not."""

import importlib.util
import json
import os
from typing import Any, NamedTuple

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import sparseopt_jax as sx
from sparseopt_jax import models

DTYPES = [
    "bool", "int2", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64",
    "uint64", "float16", "float32", "float64", "complex64", "complex128", "bfloat16",
    "float4_e2m1fn", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e8m0fnu",
]  # fmt: skip


def bits(array):
    array = np.asarray(array)
    return array.dtype.name, array.shape, np.ascontiguousarray(array).tobytes()


def any_bit(array):
    return np.array([any(element.tobytes()) for element in array.reshape(-1)], bool).reshape(
        array.shape
    )


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert bits(one) == bits(other)


@st.composite
def arrays(draw, sparse=True):
    """Any bytes, NaN payloads and -0.0 among them; or few that are not 0."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    words = rng.integers(0, 256, (int(np.prod(shape)), dtype.itemsize), np.uint8)
    if dtype.name.startswith(("int2", "int4", "uint4", "float4")):
        words &= 3 if dtype.name == "int2" else 15
    if dtype.kind == "b":
        words &= 1
    words *= rng.random((len(words), 1)) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    return words.reshape(-1).view(dtype).reshape(shape)


keys = st.one_of(st.text(max_size=3), st.sampled_from(["__metadata__", "a/b", "packed positions"]))
trees = st.recursive(
    arrays(),
    lambda inner: st.one_of(
        st.dictionaries(keys, inner, max_size=3), st.lists(inner, max_size=3), st.tuples(inner)
    ),
    max_leaves=5,
)


@hypothesis.given(trees, st.booleans(), st.integers(0, 2**32 - 1))
def test_any_tree_comes_back_bit_for_bit(tmp_path_factory, tree, masked, seed):
    file = tmp_path_factory.mktemp("compact") / "file"
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
    hypothesis.assume(len(set(paths)) == len(paths))
    rng = np.random.default_rng(seed)
    masks = None
    if masked:  # more is active than is not 0
        masks = jax.tree.map(lambda a: any_bit(a) | (rng.random(a.shape) < 0.3), tree)
    sx.save_compact(file, tree, masks)
    assert_same_bits(sx.load_compact(file, tree), tree)
    if masked:
        assert_same_bits(sx.load_compact_masks(file, tree), masks)
    else:
        with pytest.raises(ValueError, match="without masks"):
            sx.load_compact_masks(file, tree)


def test_special_values_and_active_zeros_survive(tmp_path):
    payload = np.array([0x7FC01234, 0xFF800000, 0x80000000, 1], np.uint32).view(np.float32)
    kernel = np.zeros((10, 10), np.float32)
    kernel.reshape(-1)[[3, 50, 51, 99]] = payload
    mask = np.zeros((10, 10), bool)
    mask.reshape(-1)[[0, 3, 50, 51, 98, 99]] = True  # 0 and 98 are active and 0
    sx.save_compact(tmp_path / "f", {"w": kernel}, {"w": mask})
    assert bits(sx.load_compact(tmp_path / "f")["w"]) == bits(kernel)
    assert bits(sx.load_compact_masks(tmp_path / "f")["w"]) == bits(mask)


class Layer(NamedTuple):
    kernel: Any
    bias: Any


def test_without_a_template_nested_dicts_come_back(tmp_path):
    tree = {"a": [jnp.ones(2), (jnp.zeros(3),)], "b": Layer(jnp.eye(3), None), 3: jnp.int32(7)}
    tree = {"top": tree["a"], "b": tree["b"], "three": {3: tree[3]}}
    sx.save_compact(tmp_path / "f", tree)
    expected = {
        "top": {0: tree["top"][0], 1: {0: tree["top"][1][0]}},
        "b": {"kernel": tree["b"].kernel},
        "three": {3: tree["three"][3]},
    }
    assert_same_bits(sx.load_compact(tmp_path / "f"), expected)
    assert isinstance(sx.load_compact(tmp_path / "f", tree)["b"], Layer)
    sx.save_compact(tmp_path / "one", jnp.arange(3))
    assert_same_bits(sx.load_compact(tmp_path / "one"), jnp.arange(3))


def test_modules_come_back_by_a_template(tmp_path):
    model = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    other = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(1))
    sx.save_compact(tmp_path / "eqx", model)
    loaded = sx.load_compact(tmp_path / "eqx", other)
    assert_same_bits(eqx.filter(loaded, eqx.is_array), eqx.filter(model, eqx.is_array))
    assert loaded.activation is other.activation

    module = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    state = nnx.state(module, nnx.Param)
    masks = jax.tree.map(lambda leaf: leaf != 0, state)
    sx.save_compact(tmp_path / "nnx", state, masks)
    fresh = nnx.Linear(3, 4, rngs=nnx.Rngs(1))
    nnx.update(fresh, sx.load_compact(tmp_path / "nnx", nnx.state(fresh, nnx.Param)))
    assert bits(fresh.kernel[...]) == bits(module.kernel[...])
    assert_same_bits(sx.load_compact_masks(tmp_path / "nnx", state), masks)


def test_numbers_and_the_kinds_of_a_templates_leaves(tmp_path):
    tree = {"n": 3, "flag": True, "x": 0.1, "numpy": np.float64([0.1, 0.2]), "jax": jnp.ones(2)}
    sx.save_compact(tmp_path / "f", tree)
    loaded = sx.load_compact(tmp_path / "f", tree)
    assert {k: type(v) for k, v in loaded.items()} == {k: type(v) for k, v in tree.items()}
    assert loaded["x"] == 0.1


@pytest.mark.parametrize("name", DTYPES)
def test_jax_gets_every_dtype_that_it_holds(tmp_path, name):
    array = np.array([0, 1, 1, 0] * 5).astype(name)
    sx.save_compact(tmp_path / "f", {"a": array})
    assert type(sx.load_compact(tmp_path / "f")["a"]) is np.ndarray
    template = {"a": jax.ShapeDtypeStruct(array.shape, array.dtype)}
    loaded = sx.load_compact(tmp_path / "f", template)["a"]
    assert bits(loaded) == bits(array)
    wide = name in ("int64", "uint64", "float64", "complex128")  # jax_enable_x64 is off
    assert isinstance(loaded, np.ndarray if wide else jax.Array)
    if not wide:
        sx.save_compact(tmp_path / "g", {"a": loaded})
        assert bits(sx.load_compact(tmp_path / "g")["a"]) == bits(array)


def test_big_endian_arrays_and_views(tmp_path):
    array = np.arange(24, dtype=">f4").reshape(4, 6)[::2, ::-1]
    sx.save_compact(tmp_path / "f", {"w": array})
    np.testing.assert_array_equal(np.asarray(sx.load_compact(tmp_path / "f")["w"]), array)


def test_bfloat16_values_are_the_nearest_ones(tmp_path):
    rng = np.random.default_rng(0)
    mask = rng.random((64, 64)) < 0.1
    params = {
        "kernel": np.where(mask, rng.normal(size=(64, 64)), 0).astype(np.float32),
        "half": np.where(mask, rng.normal(size=(64, 64)), 0).astype(np.float16),
        "bias": rng.normal(size=64).astype(np.float32),
    }
    params["kernel"][mask.nonzero()[0][0], mask.nonzero()[1][0]] = 1e-45  # rounds to 0
    masks = {"kernel": mask, "half": mask, "bias": None}
    sx.save_compact(tmp_path / "exact", params, masks)
    sx.save_compact(tmp_path / "half", params, masks, values="bfloat16")
    loaded = sx.load_compact(tmp_path / "half")
    expected = params["kernel"].astype(ml_dtypes.bfloat16).astype(np.float32)
    assert_same_bits(loaded, params | {"kernel": expected})
    masks["bias"] = np.ones(64, bool)
    assert_same_bits(sx.load_compact_masks(tmp_path / "half"), masks)
    sizes = [(tmp_path / name).stat().st_size for name in ("half", "exact")]
    assert sizes[1] - sizes[0] > mask.sum()


# Bytes of ResNet-50's shapes; the goal at each sparsity is 6.26, 11.5 and 4.1 MB with statistics.
@pytest.mark.parametrize(("sparsity", "goal"), [(0.9, 11.5e6), (0.95, 6.26e6), (0.97, 4.1e6)])
def test_sizes_of_resnet50(tmp_path, sparsity, goal):
    model, image = models.ResNet50(), jnp.ones((1, 64, 64, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    layers = {jax.tree_util.keystr(path): leaf for path, leaf in leaves if leaf.ndim > 1}
    counts = sx.ERK(sparsity).layer_counts({p: leaf.shape for p, leaf in layers.items()})
    rng = np.random.default_rng(0)
    tree, active = {"statistics": rng.normal(size=53_120).astype(np.float32)}, 0
    for path, leaf in layers.items():
        flat = np.zeros(leaf.size, np.float32)
        chosen = rng.choice(leaf.size, counts[path], replace=False, shuffle=False)
        scale = np.float32((2 / np.prod(leaf.shape[:-1]) / (1 - sparsity)) ** 0.5)
        flat[chosen] = scale * rng.standard_normal(counts[path], np.float32)
        tree[path] = flat.reshape(leaf.shape)
        active += counts[path]
    rest = sum(leaf.size for leaf in jax.tree.leaves(shapes)) - sum(x.size for x in layers.values())
    tree["rest"] = rng.normal(size=rest).astype(np.float32)
    assert sum(leaf.nbytes for leaf in tree.values()) == 102_440_608
    sx.save_compact(tmp_path / "f", tree)
    assert (tmp_path / "f").stat().st_size < goal * 0.91
    assert_same_bits(sx.load_compact(tmp_path / "f", tree), tree)


def test_masks_of_whole_neurons_take_next_to_nothing(tmp_path):
    kernel = np.zeros((512, 512), np.int8)
    kernel[:, ::8] = 1
    sx.save_compact(tmp_path / "f", {"kernel": kernel})
    assert (tmp_path / "f").stat().st_size < kernel.size // 8 // 10  # a bit a place, compressed


def test_safetensors_readers_see_the_dense_leaves(tmp_path):
    """The format's rules, checked by hand: what its readers refuse a file for."""
    tree = {
        "a": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)},
        "b": np.int8([1, 2, 3]),
        "h": np.array([1.5, 2], ml_dtypes.bfloat16),
        "k": np.eye(40, dtype=np.float32),
    }
    file = tmp_path / "f.safetensors"
    sx.save_compact(file, tree)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert all(isinstance(value, str) for value in header.pop("__metadata__").values())
    spans = sorted(tensor["data_offsets"] for tensor in header.values())
    assert [a for a, _ in spans] == [0, *(b for _, b in spans[:-1])]  # no hole
    assert spans[-1][1] == len(content) - 8 - length
    assert header["a/w"]["dtype"] == "F32"
    assert header["a/w"]["shape"] == [2, 3]
    assert (8 + length + header["a/w"]["data_offsets"][0]) % 4 == 0
    if importlib.util.find_spec("safetensors") is None:
        return
    from safetensors.numpy import load_file

    loaded = load_file(file)
    for name, array in (("a/w", tree["a"]["w"]), ("b", tree["b"]), ("h", tree["h"])):
        assert bits(loaded[name]) == bits(array)


@pytest.fixture
def saved(tmp_path):
    params = {"w": np.where(np.random.default_rng(0).random((40, 40)) < 0.1, 1.5, 0), "b": [1.0]}
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    sx.save_compact(tmp_path / "good", params)
    return tmp_path / "good"


def test_every_shorter_file_and_every_wrong_byte_is_refused(saved):
    content = saved.read_bytes()
    wrong = saved.with_name("wrong")
    for length in range(0, len(content), 7):
        wrong.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"wrong' is (cut short|no compact file)"):
            sx.load_compact(wrong)
    for at in range(len(content)):
        wrong.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        with pytest.raises(
            ValueError, match=r"wrong' is (damaged|cut short|no compact file|a compact file of ver)"
        ):
            sx.load_compact(wrong)
    wrong.write_bytes(content + b"x")
    with pytest.raises(ValueError, match="damaged"):
        sx.load_compact(wrong)


def test_other_files_are_named_for_what_they_are(saved, tmp_path):
    other = tmp_path / "other"
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    for content in (b"", b"\x93NUMPY" + bytes(200), len(header).to_bytes(8, "little") + header):
        other.write_bytes(content)
        with pytest.raises(ValueError, match="other' is no compact file"):
            sx.load_compact(other)
    newer = saved.read_bytes().replace(b'compact":"1"', b'compact":"9"', 1)
    other.write_bytes(newer)
    with pytest.raises(ValueError, match="version 9, and this sparseopt_jax reads version 1"):
        sx.load_compact(other)
    with pytest.raises(FileNotFoundError):
        sx.load_compact(tmp_path / "nothing")


def test_a_template_must_fit(saved):
    good = {"w": jnp.ones((40, 40)), "b": [jnp.ones(())]}
    assert_same_bits(sx.load_compact(saved, good), sx.load_compact(saved, good))
    for template, message in (
        ({"w": good["w"]}, "not in template: b/0"),
        (good | {"v": jnp.ones(1)}, "not in the file: v;"),
        (good | {"w": jnp.ones((40, 41))}, r"'w' has shape \(40, 41\)"),
        (good | {"w": jnp.ones((40, 40), jnp.bfloat16)}, "'w' has dtype bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            sx.load_compact(saved, template)


def test_bad_arguments(tmp_path):
    file, w = tmp_path / "f", jnp.ones((2, 2))
    for error, call, message in (
        (ValueError, lambda: sx.save_compact(file, {"w": w}, values="half"), "values must be"),
        (ValueError, lambda: sx.save_compact(file, {"w": w}, {"v": w > 0}), "tree structure"),
        (TypeError, lambda: sx.save_compact(file, {"w": w}, {"w": w}), "must be a bool array"),
        (ValueError, lambda: sx.save_compact(file, {"w": w}, {"w": w > 2}), "4 weights that are"),
        (TypeError, lambda: sx.save_compact(file, {"k": jax.random.key(0)}), "random.key_data"),
        (TypeError, lambda: sx.save_compact(file, {"k": np.array(["a"])}), "or bool"),
        (TypeError, lambda: sx.save_compact(file, {"k": np.array([None])}), "or bool"),
        (TypeError, lambda: sx.save_compact(file, {"k": np.longdouble([1])}), "not longdouble"),
        (ValueError, lambda: sx.save_compact(file, {"a/b": w, "a": {"b": w}}), "two leaves"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(saved, monkeypatch):
    before = saved.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        sx.save_compact(saved, {"w": jnp.ones(3)})
    assert [path.name for path in saved.parent.iterdir()] == ["good"]
    assert saved.read_bytes() == before
