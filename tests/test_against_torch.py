"""The comparison with PyTorch, with stand-ins for it: it is not installed here."""

import types

import pytest

from experiments.benchmarks import against_torch
from experiments.benchmarks.workers import Side
from tests.train_runs import standard_promotion

CASE = {
    "framework": "jax", "model": "mlp", "method": "sparse", "seeds": 1, "batch_size": 8,
    "dtype": "float32", "image_size": 8, "examples": 32,
}  # fmt: skip


class FakeSide:
    """Takes `seconds_per_image` of the prepared case's method; does not fit batches above 64."""

    def __init__(self, seconds_per_image):
        self.seconds_per_image, self.prepared = seconds_per_image, None

    def __call__(self, name, *arguments):
        if name == "prepare":
            if arguments[0]["batch_size"] > 64:
                raise RuntimeError("OutOfMemory: 64 at most")
            self.prepared = arguments[0]
        elif name == "run":
            case, steps = arguments
            assert case == self.prepared
            overhead = 0.01 / case["batch_size"]  # larger batches are more efficient
            per_image = self.seconds_per_image[case["method"]] + overhead
            return steps * case["batch_size"] * case["seeds"] * per_image
        elif name == "drop":
            self.prepared = None
        return None


def test_each_has_its_best_batch_and_ratios_are_of_rates(capsys):
    sides = {"torch": FakeSide({"dense": 0.01}), "jax": FakeSide({"dense": 0.004, "sparse": 0.005})}
    cases = [
        [CASE | {"framework": f, "method": m, "batch_size": b} for b in (16, 64, 256)]
        for f, m in (("torch", "dense"), ("jax", "dense"), ("jax", "sparse"))
    ]
    asked = types.SimpleNamespace(steps=3, repeats=3)
    found = against_torch.compare(sides, cases, asked)
    assert list(found) == ["dense", "sparse"]
    assert {row["case"]["batch_size"] for row in found.values()} == {64}
    theirs = 0.01 + 0.01 / 64
    assert found["dense"]["ratio"] == pytest.approx(theirs / (0.004 + 0.01 / 64))
    assert found["sparse"]["ratio"] == pytest.approx(theirs / (0.005 + 0.01 / 64))
    assert found["sparse"]["images_per_second"] == pytest.approx(1 / (0.005 + 0.01 / 64))
    assert "OutOfMemory: 64 at most" in capsys.readouterr().out


def test_a_process_answers_raises_and_ends(capfd):
    side = Side("jax", against_torch.WORKERS["jax"])
    assert side("parameters", {"model": "resnet50"}) == 25_557_032
    with pytest.raises(RuntimeError, match=r"AttributeError: .*'nothing'"):
        side("nothing")
    side.close()
    lost = Side("torch", against_torch.WORKERS["torch"])
    lost._process.kill()
    with pytest.raises(RuntimeError, match="the process of torch ended with -9"):
        lost("environment")


def test_no_batch_fits():
    with pytest.raises(RuntimeError, match="no batch size could be run: OutOfMemory"):
        against_torch.best_batch(FakeSide({}), [CASE | {"batch_size": 128}], 1)


@pytest.mark.parametrize(("method", "seeds"), [("sparse", 1), ("dense", 2)])
def test_our_side_trains(method, seeds):
    """Over the end of an epoch of four steps, by itself and with two seeds in one program."""
    worker, case = against_torch.JaxWorker(), CASE | {"method": method, "seeds": seeds}
    with standard_promotion():
        assert worker.prepare(case) > 0
        assert worker.run(case, 6) > 0
    worker.drop()
    with pytest.raises(AssertionError):
        worker.run(case, 1)


def test_parameters_are_those_of_torchvision():
    """torchvision's page on resnet50 gives 25,557,032."""
    assert against_torch.JaxWorker().parameters({"model": "resnet50"}) == 25_557_032


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--model"),
        (["--model=resnet50", "--batch_sizes=64,x"], "--batch_sizes=64,x must be whole numbers"),
        (["--model=resnet50", "--steps=100"], "--steps=100 must be at most 90"),
        (["--model=resnet20", "--examples=64"], "--examples=64 must be at least a batch"),
        (["--model=resnet20", "--repeats=0"], "must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        against_torch.main(words)
    assert message in capsys.readouterr().err


def test_pytorch_must_be_installed(capsys, monkeypatch):
    monkeypatch.setattr(against_torch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        against_torch.main(["--model=resnet20"])
    assert "torch and torchvision must be installed" in capsys.readouterr().err
