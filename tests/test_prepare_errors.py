"""What `experiments.prepare` says of failed downloads, wrong settings and damaged files."""

import errno
import http.server
import pathlib
import re
import shutil
import threading
import time

import promise
import pytest
import requests
import tensorflow_datasets as tfds

from experiments import prepare, prepare_errors
from experiments.config import ConfigError
from experiments.data.errors import DataError
from tests import make_data
from tests.make_data import CIFAR_URLS
from tests.make_data import run_prepare_here as run


@pytest.fixture(autouse=True)
def with_tensorflow(monkeypatch):
    """What is tested in this process ends before TensorFlow would be imported."""
    monkeypatch.setattr(prepare_errors, "has_tensorflow", lambda: True)


@pytest.fixture
def server(monkeypatch):
    """A proxy for http, which answers from a dict of contents by file name, and notes requests."""
    contents, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rsplit("/", 1)[-1]
            asked.append(name)
            content = contents.get(name)
            if content is None and "wait" in contents:
                contents["wait"]()
            self.send_response(200 if content is not None else 404)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *arguments):
            del arguments

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        proxy = f"http://127.0.0.1:{running.server_port}"
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, proxy)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield contents, asked
        running.shutdown()
        thread.join()


def test_a_failed_download_keeps_the_others(tmp_path, capsys, server, monkeypatch):
    contents, asked = server
    make_data.idx_files(tmp_path / "idx", train=3, test=2)
    files = {path.name: path.read_bytes() for path in (tmp_path / "idx").iterdir()}
    missing = "t10k-labels-idx1-ubyte.gz"
    contents.update({name: content for name, content in files.items() if name != missing})
    # The published files have other checksums; these are to be accepted. Unpacking them, which
    # begins as soon as one has arrived, needs TensorFlow.
    fashion_mnist = tfds.builder_cls("fashion_mnist")
    monkeypatch.setattr(fashion_mnist, "url_infos", {})
    monkeypatch.setattr(tfds.core.download.checksums, "get_all_url_infos", dict)
    unpacked = lambda self, resource: promise.Promise.resolve(resource.path)  # noqa: E731
    monkeypatch.setattr(tfds.download.DownloadManager, "_extract", unpacked)
    downloads = tmp_path / "downloads" / "fashion_mnist"
    contents["wait"] = lambda: wait_for(lambda: len(list(downloads.glob("*.INFO"))) == 3)
    arguments = ["--dataset=fashion_mnist", f"--data_dir={tmp_path}"]
    code, _, err = run(capsys, *arguments)
    assert code == 1
    assert f"{fashion_mnist.URL}{missing}. HTTP code: 404" in err
    assert f"into {tmp_path / 'downloads'}" in err
    assert sorted(asked) == sorted(files)
    assert not list((tmp_path / "fashion_mnist").iterdir())
    asked.clear()
    assert run(capsys, *arguments)[0] == 1
    assert asked == [missing]
    assert not list(downloads.glob("*.tmp.*"))


def wait_for(condition):
    """Returns when a thread that goes on by itself has come as far."""
    for _ in range(1_000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def test_a_download_with_the_wrong_checksum(tmp_path, capsys, server):
    contents, _ = server
    make_data.idx_files(tmp_path / "idx", train=3, test=2)
    contents.update({path.name: path.read_bytes() for path in (tmp_path / "idx").iterdir()})
    code, _, err = run(capsys, "--dataset=fashion_mnist", f"--data_dir={tmp_path}")
    assert code == 1
    assert re.search(
        r"not the published one: Artifact http://fashion-mnist\..*has wrong checks", err
    )
    assert not list((tmp_path / "downloads" / "fashion_mnist").glob("*.gz"))


def test_no_network(tmp_path, capsys, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # discard: nobody listens
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(prepare, "RETRIES", 0)
    code, _, err = run(capsys, "--dataset=cifar100", f"--data_dir={tmp_path}")
    assert code == 1
    assert f"cannot download {CIFAR_URLS['cifar100']} into {tmp_path / 'downloads'}" in err
    assert "Is there a network?" in err
    assert not list((tmp_path / "downloads" / "cifar100").glob("*.tmp.*"))


# What else goes wrong.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data_dir={}"], "--dataset is missing"),
        (["--dataset=cifar10"], "--data_dir= must be a local folder"),
        (["--dataset=cifar10", "--data_dir=gs://b"], "--data_dir=gs://b must be a local folder"),
        (
            ["--dataset=imagenet2021", "--data_dir={}"],
            "no dataset 'imagenet2021'. Did you mean 'im",
        ),
        (["--dataset=cifar 10", "--data_dir={}"], "dataset='cifar 10' must be"),
        (["--dataset=emnist/leters", "--data_dir={}"], "no such config. Did you mean 'letters'?"),
        (["--dataset=cifar10:1.0.0", "--data_dir={}"], "cannot be loaded at version 1.0.0, only"),
        (["--dataset=clevr", "--data_dir={}"], "clevr is not an image-classification dataset"),
        (["--dataset=resisc45", "--data_dir={}"], "extract it to the manual_dir"),
        (
            ["--dataset=cifar10", "--data_dir={}", "--idx_dir={}"],
            "--idx_dir is for mnist, fashion_",
        ),
        (["--dataset=mnist", "--data_dir={}", "--idx_dir={}/no"], "/no: no such folder"),
        (["--dataset=mnist", "--datadir={}"], "no such argument. Did you mean '--data_dir'?"),
    ],
)
def test_wrong_settings(tmp_path, capsys, arguments, message):
    code, out, err = run(capsys, *(argument.format(tmp_path) for argument in arguments))
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert not out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dataset", ["digits", "folder"])
def test_nothing_to_prepare(capsys, dataset):
    code, out, _ = run(capsys, f"--dataset={dataset}")
    assert code == 0
    assert "there is nothing to prepare" in out
    assert "python -m experiments.train --config=experiments/configs/" in out


def test_help_names_the_package_with_real_images(capsys):
    with pytest.raises(SystemExit) as caught:
        prepare.main(["--help"])
    assert caught.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "Debian's package dataset-fashion-mnist" in words
    assert "--idx_dir=/usr/share/datasets/fashion-mnist" in words


@pytest.fixture
def mnist(tmp_path, capsys):
    """The arguments that prepared a small mnist, and its folder."""
    make_data.idx_files(tmp_path / "idx", train=3, test=2)
    arguments = ["--dataset=mnist", f"--data_dir={tmp_path}", f"--idx_dir={tmp_path / 'idx'}"]
    assert run(capsys, *arguments)[0] == 0
    return arguments, tmp_path / "mnist" / "3.0.1"


def test_already_prepared(mnist, capsys):
    arguments, folder = mnist
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert "mnist is already prepared." in out
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_already_prepared_in_another_format(mnist, capsys):
    arguments, folder = mnist
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert f"{folder} is stored as tfrecord" in err
    assert "--data_dir=ANOTHER_DIR" in err
    assert f"move {folder} away" in err


def test_already_prepared_but_damaged(mnist, capsys):
    arguments, folder = mnist
    path = folder / "mnist-test.array_record-00000-of-00001"
    path.write_bytes(b"")
    code, _, err = run(capsys, *arguments)
    assert code == 1
    assert f"{path} is empty" in err
    (folder / "dataset_info.json").unlink()
    code, _, err = run(capsys, *arguments)
    assert code == 1
    assert f"{folder} has no dataset_info.json" in err


def test_data_dir_that_cannot_be_made(tmp_path, capsys):
    make_data.idx_files(tmp_path / "idx", train=3, test=2)
    (tmp_path / "file").touch()
    data_dir = tmp_path / "file" / "data"
    arguments = ["--dataset=mnist", f"--data_dir={data_dir}", f"--idx_dir={tmp_path / 'idx'}"]
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert f"--data_dir={data_dir}: cannot be written to" in err


def test_without_tensorflow(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare_errors, "has_tensorflow", lambda: False)
    code, _, err = run(capsys, "--dataset=cifar10", f"--data_dir={tmp_path}")
    assert code == 2
    assert "cifar10: preparing it needs TensorFlow" in err
    assert "pip install '.[prepare]'" in err
    code, _, err = run(capsys, "--dataset=cifar1", f"--data_dir={tmp_path}")
    assert code == 2
    assert "Did you mean 'cifar10'? Some are known only where TensorFlow is installed" in err
    assert not list(tmp_path.iterdir())


def test_progress_where_there_is_no_terminal(mnist, capsys, monkeypatch):
    arguments, folder = mnist
    shutil.rmtree(folder)
    monkeypatch.setattr(prepare, "REPORT_EVERY", 0.01)
    printed = []
    builder = tfds.core.DatasetBuilder
    generate = builder.download_and_prepare

    def after_two_lines(self, **options):
        wait_for(
            lambda: printed.append(capsys.readouterr().out) or "".join(printed).count("min") > 1
        )
        return generate(self, **options)

    monkeypatch.setattr(builder, "download_and_prepare", after_two_lines)
    assert prepare.main(arguments) == 0
    lines = "".join(printed).splitlines()[1:]  # the first says what is being prepared
    pattern = r"mnist: 0\.00 GB downloaded, 0\.00 GB written, 0\.\d minutes"
    assert all(re.fullmatch(pattern, line) for line in lines)
    assert not [thread for thread in threading.enumerate() if "report" in thread.name]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/data/x"),
            DataError,
            "no space left on ",
        ),
        (
            RuntimeError("write() failed: No space left on device"),
            DataError,
            "no space left on the",
        ),
        (
            OSError("Not enough disk space. Needed: 3 GiB"),
            DataError,
            "no space left on the disk of",
        ),
        (ModuleNotFoundError("No module named 'scipy'", name="scipy.io"), ConfigError, "'scipy'"),
        (ModuleNotFoundError("", name="tensorflow"), ConfigError, r"pip install '\.\[prepare\]'"),
        (requests.exceptions.Timeout("slow"), DataError, "cannot download a file into /data/down"),
        (AssertionError("wrong\n  version"), ConfigError, "cifar10: wrong version"),
        (KeyError("x"), DataError, "failed inside tensorflow-datasets: KeyError: 'x'"),
    ],
)
def test_what_is_said_of_an_error(error, kind, message):
    for shown in (error, ValueError("wrapped")):
        if shown is not error:
            if isinstance(error, (AssertionError, KeyError)):
                continue
            shown.__cause__ = error
        said = prepare_errors.explain(shown, "cifar10", pathlib.Path("/data"))
        assert type(said) is kind
        assert re.search(message, str(said))
        assert str(said).startswith("cifar10: ")
