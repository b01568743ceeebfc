"""Checkpoints by themselves: what is kept, what damage does, fingerprints, devices, a full disk."""

import json
import pathlib
import pickle
import shutil
import subprocess
import sys
import typing

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import checkpoint
from experiments.checkpoint import CheckpointError, Checkpoints


class Pair(typing.NamedTuple):
    first: typing.Any
    second: typing.Any


def make_arrays(seed):
    """Leaves of every dtype that a state has, a scalar among them, as NumPy's."""
    rng = np.random.default_rng(seed)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45], np.float32)
    return {
        "pair": Pair(rng.normal(size=(16, 8)).astype(np.float32), rng.random((16, 8)) < 0.5),
        "half": [
            rng.normal(size=(8, 3)).astype(ml_dtypes.bfloat16),
            rng.normal(size=8).astype(np.float16),
        ],
        "key": rng.integers(0, 2**32, 2, np.uint32),
        "count": np.int32(seed),
        "bits": rng.integers(0, 256, (8, 5), np.uint8),
        "fan_in": rng.integers(0, 99, (1, 8), np.int32),
        "none": None,
        "special": special,
    }


def on_devices(arrays, devices=1):
    """The arrays, their first axis over so many devices where it can be divided by 8."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("x",))

    def put(array):
        divided = np.ndim(array) > 0 and len(array) > 0 and len(array) % 8 == 0
        spec = PartitionSpec("x") if divided else PartitionSpec()
        return jax.device_put(array, NamedSharding(mesh, spec))

    return jax.tree.map(put, arrays)


def shapes_of(arrays):
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), arrays
    )


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == np.asarray(theirs).dtype
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def save_all(folder, accuracies, keep_last=2, keep_best=True):
    """Saves one checkpoint after the other; returns the steps that are kept."""
    with Checkpoints(folder, keep_last, keep_best) as checkpoints:
        for step, accuracy in accuracies.items():
            checkpoints.save(step, {"w": jnp.full(3, step)}, {"step": step}, accuracy)
        checkpoints.wait()
        kept = checkpoints.steps()
    assert sorted(int(path.name) for path in folder.iterdir()) == kept
    return kept


ACCURACIES = {10: 0.5, 20: 0.9, 30: None, 40: 0.7, 50: None}


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "kept"),
    [(1, False, [50]), (2, False, [40, 50]), (2, True, [20, 40, 50]), (4, True, [20, 30, 40, 50])],
)
def test_the_last_and_the_best_are_kept(keep_last, keep_best, kept, tmp_path):
    assert save_all(tmp_path / "c", ACCURACIES, keep_last, keep_best) == kept


def test_the_best_is_known_after_a_new_start(tmp_path):
    save_all(tmp_path / "c", ACCURACIES)
    assert save_all(tmp_path / "c", {60: 0.8, 70: None, 80: 0.85}) == [20, 70, 80]
    assert save_all(tmp_path / "c", {90: 0.95, 100: None, 110: None}) == [90, 100, 110]


def test_everything_comes_back_bit_for_bit(tmp_path):
    arrays, notes = make_arrays(1), {"nested": {"a": [1, 2.5, None, "é", True]}, "pi": 0.1 + 0.2}
    state = on_devices(arrays)
    with Checkpoints(tmp_path / "c", 2, True) as checkpoints:
        assert checkpoints.restore(shapes_of(state)) is None
        checkpoints.save(7, state, notes, 0.25)
        checkpoints.wait()
        found = checkpoints.restore(shapes_of(state))
    assert found.step == 7
    assert_same_bits(found.arrays, arrays)
    assert {name: found.notes[name] for name in notes} == notes


def test_a_save_does_not_see_what_happens_to_the_arrays_afterwards(tmp_path):
    """The training step uses the memory again at once."""
    state = on_devices(make_arrays(1))
    again = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)
    with Checkpoints(tmp_path / "c", 2, True) as checkpoints:
        shapes = shapes_of(state)
        checkpoints.save(1, state, {})
        again(state)
        found = checkpoints.restore(shapes)
    assert_same_bits(found.arrays, make_arrays(1))


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    with Checkpoints(tmp_path / "c", 2, True) as checkpoints:
        for value, accuracy in ((1, None), (2, 0.5)):
            state = {"w": jnp.full(3, value)}
            checkpoints.save(10, state, {"value": value}, accuracy)
        found = checkpoints.restore(shapes_of(state))
        assert checkpoints.steps() == [10]
    assert found.notes["value"] == 2
    np.testing.assert_array_equal(found.arrays["w"], np.full(3, 2))


def test_what_a_killed_save_has_left_is_removed(tmp_path):
    save_all(tmp_path / "c", {10: None})
    shutil.copytree(tmp_path / "c/10", tmp_path / "c/20.orbax-checkpoint-tmp")
    assert save_all(tmp_path / "c", {20: None}) == [10, 20]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints of the steps 10 and 20, and the shapes of their arrays."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder, 2, True) as checkpoints:
        for step in (10, 20):
            state = on_devices(make_arrays(step))
            checkpoints.save(step, state, {"step": step, "lr": 0.125}, step / 100)
    return folder, shapes_of(state)


def largest(folder):
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def write_text(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


DAMAGE = {
    "arrays are cut short": lambda c: largest(c / "arrays/d").write_bytes(
        largest(c / "arrays/d").read_bytes()[:1000]
    ),
    "arrays are deleted": lambda c: largest(c / "arrays/d").unlink(),
    "a bit of the arrays is wrong": lambda c: flip(largest(c / "arrays/d")),
    "the list of arrays is cut short": lambda c: (c / "arrays/_METADATA").write_text('{"tree'),
    "all of the arrays are deleted": lambda c: shutil.rmtree(c / "arrays"),
    "the notes are deleted": lambda c: (c / "_CHECKPOINT_METADATA").unlink(),
    "the notes are cut short": lambda c: (c / "_CHECKPOINT_METADATA").write_text('{"item'),
    "a digit of the notes is wrong": lambda c: write_text(
        c / "_CHECKPOINT_METADATA", "0.125", "0.625"
    ),
    "a name in orbax's own notes is wrong": lambda c: write_text(
        c / "_CHECKPOINT_METADATA", "commit_timestamp_nsecs", "commit_timestamp_nsecz"
    ),
    "the accuracy is cut short": lambda c: (c / "metrics/metrics").write_text(""),
    "only an empty folder is left": lambda c: (shutil.rmtree(c), c.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, saved, tmp_path, capfd):
    folder, shapes = tmp_path / "checkpoints", saved[1]
    shutil.copytree(saved[0], folder)
    DAMAGE[damage](folder / "20")
    said = []
    with Checkpoints(folder, 2, True, said.append) as checkpoints:
        found = checkpoints.restore(shapes)
        assert found.step == 10
        assert_same_bits(found.arrays, make_arrays(10))
        (line,) = said
        assert line.startswith("the checkpoint of step 20 is damaged (")
        assert line.endswith("that of step 10 is used")
        (aside,) = (tmp_path / "damaged-checkpoints").iterdir()
        assert str(aside) in line
        # The step can be saved again, and is then the newest.
        checkpoints.save(20, on_devices(make_arrays(20)), {"step": 20}, 0.3)
        assert_same_bits(checkpoints.restore(shapes).arrays, make_arrays(20))
    assert len(said) == 1
    assert capfd.readouterr() == ("", "")  # no traces of orbax's threads


def test_files_that_only_orbax_needs_may_be_lost(saved, tmp_path):
    """The accuracy and the shardings of the time are not needed to go on."""
    shutil.copytree(saved[0], tmp_path / "c")
    shutil.rmtree(tmp_path / "c/20/metrics")
    (tmp_path / "c/20/arrays/_sharding").unlink()
    with Checkpoints(tmp_path / "c", 2, True, pytest.fail) as checkpoints:
        assert checkpoints.restore(saved[1]).step == 20


def test_where_all_are_damaged_nothing_is_moved_and_training_does_not_begin_anew(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "c")
    for step in (10, 20):
        flip(largest(tmp_path / "c" / str(step) / "arrays/d"))
    with Checkpoints(tmp_path / "c", 2, True, pytest.fail) as checkpoints:
        with pytest.raises(
            CheckpointError, match=r"no checkpoint in .*step 20: .*; step 10: "
        ) as e:
            checkpoints.restore(saved[1])
        assert checkpoints.steps() == [10, 20]
    assert str(tmp_path / "c") in str(e.value)


def test_arrays_of_another_shape_are_not_taken(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "c")
    other = saved[1] | {
        "key": jax.ShapeDtypeStruct((3,), np.uint32, sharding=saved[1]["key"].sharding)
    }
    with (
        Checkpoints(tmp_path / "c", 2, True, pytest.fail) as checkpoints,
        pytest.raises(CheckpointError, match="no checkpoint"),
    ):
        checkpoints.restore(other)


def test_the_notes_are_checked_before_any_array_is_read(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "c")

    def refuse(notes):
        raise KeyError(notes["lr"])

    with Checkpoints(tmp_path / "c", 2, True, pytest.fail) as checkpoints:
        with pytest.raises(KeyError, match=r"0\.125"):
            checkpoints.restore(None, refuse)
        assert checkpoints.steps() == [10, 20]


def test_nothing_is_pickled(saved, tmp_path, monkeypatch):
    shutil.copytree(saved[0], tmp_path / "c")

    def refuse(*arguments, **options):
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "Unpickler", "_load", "_loads", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"\x80\x04\x95" not in path.read_bytes()
    with Checkpoints(tmp_path / "c", 2, True, pytest.fail) as checkpoints:
        assert checkpoints.restore(saved[1]).step == 20


def test_eight_devices_to_four_to_one(tmp_path):
    arrays, fingerprints = make_arrays(3), set()
    with Checkpoints(tmp_path / "c", 3, False) as checkpoints:
        state = on_devices(arrays, 8)
        for step, devices in enumerate((4, 1, 8)):
            fingerprints.add(checkpoint.fingerprint(state))
            checkpoints.save(step, state, {})
            wanted = shapes_of(on_devices(arrays, devices))
            found = checkpoints.restore(wanted)
            assert found.step == step
            assert_same_bits(found.arrays, arrays)
            shardings = jax.tree.map(lambda a: a.sharding, found.arrays)
            assert shardings == jax.tree.map(lambda a: a.sharding, wanted)
            state = found.arrays
    assert len(state["pair"].first.sharding.device_set) == 8
    assert len(fingerprints) == 1


# Orbax saves no empty arrays; the fingerprint takes them.
ARRAYS = make_arrays(5) | {"empty": np.zeros((0, 4), np.float32)}
LEAVES, STRUCTURE = jax.tree.flatten(ARRAYS)
FILLED = [i for i, leaf in enumerate(LEAVES) if np.size(leaf) > 1]


def changed(index, before, after):
    """Whether the fingerprint tells two arrays apart, as leaf `index` of ARRAYS."""
    prints = []
    for leaf in (before, after):
        leaves = [*LEAVES[:index], leaf, *LEAVES[index + 1 :]]
        prints.append(checkpoint.fingerprint(on_devices(jax.tree.unflatten(STRUCTURE, leaves))))
        assert len(prints[-1]) == 8 * len(LEAVES)
    mine = slice(8 * index, 8 * index + 8)
    others = [text[: mine.start] + text[mine.stop :] for text in prints]
    assert others[0] == others[1]
    return prints[0][mine] != prints[1][mine]


@hypothesis.given(data=st.data())
def test_any_flipped_bit_changes_the_fingerprint_of_its_leaf(data):
    index = data.draw(st.sampled_from(FILLED))
    leaf = np.array(LEAVES[index])
    flat = leaf.reshape(-1).view(np.uint8)
    byte = data.draw(st.integers(0, flat.size - 1))
    bit = 0 if leaf.dtype == bool else data.draw(st.integers(0, 7))
    flat[byte] ^= np.uint8(1 << bit)
    assert changed(index, LEAVES[index], leaf)


@hypothesis.given(data=st.data())
def test_elements_that_swap_places_change_the_fingerprint_of_their_leaf(data):
    """Also where they differ only in the sign."""
    index = data.draw(st.sampled_from(FILLED))
    before = np.array(LEAVES[index])
    flat = before.reshape(-1)
    places = data.draw(st.lists(st.integers(0, flat.size - 1), min_size=2, max_size=2, unique=True))
    if jnp.issubdtype(before.dtype, jnp.floating) and data.draw(st.booleans()):
        flat[places[1]] = -flat[places[0]]
    after = before.copy()
    after.reshape(-1)[places] = flat[places[::-1]]
    assert changed(index, before, after) == (before.tobytes() != after.tobytes())


def test_a_scalar_has_a_fingerprint_of_its_own():
    assert len({checkpoint.fingerprint(np.int32(value)) for value in range(-50, 50)}) == 100


def test_all_finite():
    assert checkpoint.all_finite({})
    assert checkpoint.all_finite(
        {"w": jnp.ones(3), "n": jnp.arange(3), "h": jnp.ones(2, "bfloat16")}
    )
    for bad in (np.nan, np.inf, -np.inf):
        assert not checkpoint.all_finite([jnp.ones(3), jnp.array([1, bad], "bfloat16")])


FULL_DISK = """
import json, pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from experiments.checkpoint import CheckpointError, Checkpoints

folder, size = pathlib.Path(sys.argv[1]) / "checkpoints", 250_000  # a megabyte
arrays = lambda n: {"w": jnp.asarray(np.random.default_rng(0).random(n * size, np.float32))}
w = arrays(1)["w"]
shape = {"w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding)}
told = []
for attempt in range(2):
    try:
        with Checkpoints(folder, 2, True) as checkpoints:
            if not attempt:
                checkpoints.save(1, arrays(1), {"step": 1})
                checkpoints.wait()
            checkpoints.save(2, arrays(3), {"step": 2})
    except CheckpointError as error:
        told.append(str(error))
left = sorted(path.name for path in folder.iterdir())
with Checkpoints(folder, 2, True) as checkpoints:
    found = checkpoints.restore(shape)
    same = bool((found.arrays["w"] == w).all())
    after = sorted(path.name for path in folder.iterdir())
    checkpoints.save(2, arrays(1), {"step": 2})  # which is small enough
print(json.dumps([told, found.step, same, left, after, checkpoints.steps()]))
"""


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    """In a file system of three megabytes, which the operating system lets some users make."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=3m tmpfs {disk}"
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("there is no command unshare")
    tried = subprocess.run([unshare, "-rm", "sh", "-c", mount], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {tried.stderr.strip()}")
    run = f'{mount} && exec "$0" -c "$1" "$2"'
    done = subprocess.run(
        [unshare, "-rm", "sh", "-c", run, sys.executable, FULL_DISK, str(disk)],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    told, step, same, left, after, kept = json.loads(done.stdout.splitlines()[-1])
    assert len(told) == 2
    for message in told:
        assert message.startswith(
            f"the checkpoint of step 2 cannot be written to {disk}/checkpoints: "
        )
        assert "No space left on device" in message
        assert "the last good one is that of step 1." in message
    assert (step, same, kept) == (1, True, [1, 2])
    assert "1" in left
    assert "2" not in left
    assert after == ["1"]
