"""The mesh and its shardings; training on eight devices, and from eight to four to one."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import sparseopt_jax as sx
from experiments import data, mesh, metrics, programs
from experiments.config import Config, ConfigError
from tests import train_runs

# Kernels of 64x64 and 64x64 are sharded, the head's 64x10 is not. Updates at 4, 8, ..., 24.
CONFIG = Config(
    model="mlp", hidden=64, sparsity=0.9, update_interval=4, epochs=3, batch_size=128,
    checkpoint_every=0, keep_best=False, diagnostics_every=0, mesh_data=1,
)  # fmt: skip
MESHES = {"8x1": (8, 1), "4x2": (4, 2), "1x8": (1, 8)}


@pytest.mark.parametrize(
    ("sizes", "devices", "expected"),
    [
        ((-1, 1), 8, (8, 1)),
        ((-1, 2), 8, (4, 2)),
        ((2, -1), 8, (2, 4)),
        ((2, 2), 8, (2, 2)),
        ((-1, 1), 1, (1, 1)),
        ((-1, 3), 8, "mesh_fsdp=3 must divide 8, the number of devices, since mesh_data=-1"),
        ((3, -1), 8, "mesh_data=3 must divide 8, the number of devices, since mesh_fsdp=-1"),
        ((4, 4), 8, "mesh_data=4 times mesh_fsdp=4 must be at most 8, the number of devices"),
    ],
)
def test_sizes_of_the_mesh(sizes, devices, expected):
    config = Config(mesh_data=sizes[0], mesh_fsdp=sizes[1])
    if isinstance(expected, tuple):
        assert mesh.mesh_shape(config, devices) == expected
        return
    with pytest.raises(ConfigError) as raised:
        mesh.mesh_shape(config, devices)
    assert expected in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"mesh_data": 0}, "mesh_data=0 must be at least 1, or -1"),
        ({"mesh_fsdp": -2}, "mesh_fsdp=-2 must be an integer at least -1"),
        ({"mesh_data": -1, "mesh_fsdp": -1}, "only one of them can take the rest"),
        ({"batch_size": 12, "bn_groups": 8}, "bn_groups=8 must divide batch_size=12"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields, named):
    with pytest.raises(ConfigError, match=named):
        Config(**fields)


def test_a_batch_that_the_devices_cannot_share_is_refused():
    with pytest.raises(ConfigError, match="batch_size=12 must be a multiple of 8, the number of"):
        mesh.make_mesh(Config(batch_size=12))


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((3, 3, 64, 128), (None, None, None, "fsdp")),  # the largest
        ((3, 3, 64, 64), (None, None, None, "fsdp")),  # of equal ones the last
        ((2048, 1000), ("fsdp", None)),
        ((7, 7, 3, 64), (None, None, None, "fsdp")),
        ((1023, 3), (None, None)),  # nothing that 8 divides
        ((2048,), ("fsdp",)),
        ((31, 32), (None, None)),  # 992 elements
        ((), ()),
    ],
)
def test_shardings_of_parameters(shape, spec):
    on_four_by_eight = mesh.make_mesh(Config(mesh_data=1, mesh_fsdp=8))
    (sharding,) = mesh.param_shardings(on_four_by_eight, [np.broadcast_to(np.float32(0), shape)])
    assert sharding.spec == PartitionSpec(*spec)
    alone = mesh.make_mesh(Config(mesh_data=8))
    (sharding,) = mesh.param_shardings(alone, [np.broadcast_to(np.float32(0), shape)])
    assert sharding.is_fully_replicated


@pytest.fixture(autouse=True, scope="module")
def _settings():
    with train_runs.standard_promotion(), train_runs.compiled_once():
        yield


def on(sizes):
    return [f"--config.mesh_data={sizes[0]}", f"--config.mesh_fsdp={sizes[1]}"]


@pytest.fixture(scope="module")
def shapes():
    """Shapes of a checkpoint's arrays, on one device."""
    dataset = data.load(CONFIG)
    model = programs.compile_model(CONFIG, dataset)
    state = programs.compile_method(CONFIG, dataset, model).functions.state
    return {"state": state, "logged_masks": sx.get_masks(state.opt_state)}


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory, shapes):
    folder = tmp_path_factory.mktemp("one") / "run"
    assert train_runs.train_here(folder, CONFIG) == 0
    return folder, train_runs.last_checkpoint(folder, "sparseopt", 0, shapes)


def check_equal(folder, one, shapes):
    """Masks overlap, weights and the log agree but for the order of additions."""
    reference_folder, expected = one
    found = train_runs.last_checkpoint(folder, "sparseopt", 0, shapes)
    assert found.step == expected.step == 33
    ours, theirs = (
        metrics.path_leaves(sx.get_masks(each.arrays["state"].opt_state))
        for each in (found, expected)
    )
    kernels = [path for path in ours if path.endswith("kernel")]
    same = sum(int((ours[path] & theirs[path]).sum()) for path in kernels)
    assert same >= 0.999 * sum(int(theirs[path].sum()) for path in kernels)
    for path in kernels:
        assert ours[path].sum() == theirs[path].sum()
    weights, reference = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(each.arrays["state"].params)])
        for each in (found, expected)
    )
    assert np.linalg.norm(weights - reference) < 1e-3 * np.linalg.norm(reference)
    logs = [
        train_runs.read_lines(f / "runs/sparseopt-seed0/metrics.jsonl")
        for f in (folder, reference_folder)
    ]
    for mine, other in zip(*logs, strict=True):
        assert mine["step"] == other["step"]
        for name in ("loss", "test_loss", "gradient_norm"):
            np.testing.assert_allclose(mine.get(name, 0), other.get(name, 0), rtol=1e-3)


@pytest.mark.parametrize("sizes", MESHES.values(), ids=list(MESHES))
def test_training_on_eight_devices_equals_one(sizes, tmp_path, on_one_device, shapes):
    assert train_runs.train_here(tmp_path / "run", CONFIG, *on(sizes)) == 0
    check_equal(tmp_path / "run", on_one_device, shapes)


def test_parameters_masks_and_momentum_are_sharded_alike():
    config = Config(**{**vars(CONFIG), "mesh_fsdp": 8})
    dataset = data.load(config)
    model = programs.compile_model(config, dataset)
    method = programs.compile_method(config, dataset, model)
    state = method.start(*model.init(np.int32(0)), np.int32(0))
    batches = dataset.train_batches(0, 0)
    for _ in range(2):  # as the step returns them, too
        kernel = state.params["dense0"]["kernel"]
        assert kernel.sharding.spec == PartitionSpec(None, "fsdp")
        assert {shard.data.shape for shard in kernel.addressable_shards} == {(64, 8)}
        named = metrics.path_leaves(state.opt_state)
        slots = [leaf for path, leaf in named.items() if "dense0/kernel" in path]
        assert len(slots) >= 3  # a byte a weight, fan-in, momentum
        for leaf in slots:
            assert leaf.sharding.spec[-1] == "fsdp"
        batch = next(batches)
        assert {shard.data.shape[0] for shard in batch.images.addressable_shards} == {128 // 8}
        state, _ = method.step(state, *batch)


def test_from_eight_devices_to_four_to_one(tmp_path, on_one_device, shapes):
    """Stopped after steps 10 and 21, each time in the middle of an epoch or of a line."""
    folder = tmp_path / "run"
    for step, sizes in ((10, (4, 2)), (21, (2, 2))):
        with train_runs.sigterm_in_step(step):
            assert train_runs.train_here(folder, CONFIG, *on(sizes)) == 143
        kept = train_runs.last_checkpoint(folder, "sparseopt", 0, shapes)
        assert kept.step == step
    assert train_runs.train_here(folder, CONFIG) == 0
    check_equal(folder, on_one_device, shapes)
