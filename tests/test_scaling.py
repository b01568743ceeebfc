"""Bytes on the wire by hand, and of programs for eight devices."""

import jax
import pytest

from experiments.benchmarks import scaling
from experiments.config import Config
from experiments.hlo import Collective

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.parametrize(
    ("kind", "sent"),
    # Rings of 4 with results of 1,000 bytes: a reduction sends 750 twice, a gather sends 3 quarters
    # of what it makes, a scatter what the three others keep.
    [
        ("all-reduce", 1500),
        ("all-gather", 750),
        ("all-to-all", 750),
        ("reduce-scatter", 3000),
        ("collective-permute", 1000),
    ],
)
def test_wire_bytes_by_hand(kind, sent):
    assert scaling.wire_bytes({kind: Collective(2, 1000)}, 4) == sent


def test_wire_bytes_are_summed_and_none_on_one_chip():
    found = {"all-reduce": Collective(1, 800), "all-gather": Collective(1, 400)}
    assert scaling.wire_bytes(found, 8) == 800 * 2 * 7 / 8 + 400 * 7 / 8
    assert scaling.wire_bytes({"all-reduce": Collective(1, 800)}, 1) == 0
    with pytest.raises(ValueError, match="kind='broadcast' must be one of all-reduce"):
        scaling.wire_bytes({"broadcast": Collective(1, 1)}, 8)


def test_share():
    assert scaling.share(1e-3, 3e-3) == 0.25


def test_programs_of_one_and_eight_devices():
    """An MLP; CPUs reduce in float32."""
    config = Config(
        dataset="imagenet2012", model="mlp", hidden=64, image_size=32, sparsity=0.5,
        topology="rigl", optimizer="sparseopt", update_interval=10,
    )  # fmt: skip
    devices = {"v5e:one": jax.devices()[:1], "v5e:eight": jax.devices()}
    one, data, fsdp = scaling.measure(config, devices, batch_per_chip=2)
    assert one["step"]["collectives"] == one["update"]["collectives"] == {}
    assert [row["mesh"] for row in (one, data, fsdp)] == ["data", "data", "fsdp"]
    weights = 4 * (32 * 32 * 3 * 64 + 64 * 64 + 64 * 1000)
    step = data["step"]["collectives"]
    assert set(step) == {"all-reduce"}
    assert weights < step["all-reduce"]["bytes"] < 1.01 * weights
    assert data["step"]["wire_bytes"] == pytest.approx(step["all-reduce"]["bytes"] * 2 * 7 / 8)
    assert data["update"]["collectives"] == {}  # every device has all weights
    # Counts, but no weights.
    assert 0 < fsdp["update"]["wire_bytes"] < 4096
    assert fsdp["step"]["wire_bytes"] > weights
    seconds = 2 * 3 * 8.229e9 / 197e12
    sent = data["step"]["wire_bytes"] / 200e9
    assert data["step"]["share_all_links"] == pytest.approx(sent / (sent + seconds), rel=1e-3)
    assert data["step"]["share_one_link"] == pytest.approx(
        4 * sent / (4 * sent + seconds), rel=1e-3
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topologies=v6e:2x2"], "--topologies=v6e:2x2 must be of v5e or v5p"),
        (["--topologies=v5e:3x3"], "v5e:3x3"),
        (["--batch_per_chip=0"], "--batch_per_chip must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        scaling.main(words)
    assert message in capsys.readouterr().err
