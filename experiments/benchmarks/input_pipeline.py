"""The input pipelines by themselves: streamed JPEGs against tf.data, and images on the device.

    python -m experiments.benchmarks.input_pipeline [--images=N] [--seconds=S] [--repeats=N]
        [--workers=1,2,4] [--plot=FILE] [--json=FILE]

Streamed: JPEGs of ImageNet's typical size (500x375, about 110 KB, textured, made here) in class
folders; random resized crops to 224x224, flipped, in batches of 64. tf.data does the same on the
same files with decode_and_crop_jpeg, resize and flip, as many in parallel as it chooses; its
`resize` is bicubic in the usual ImageNet examples, and bilinear as ours is in others, so both are
measured. Rounds alternate between all of them; medians.

On the device: the batches of an epoch of 50,000 images of 32x32x3, cropped and flipped, without a
model, against the training step of ResNet-20 on one of those batches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from experiments import data, programs
from experiments import mesh as meshes
from experiments.benchmarks import measuring
from experiments.config import Config
from experiments.data import on_device, sources, streaming
from experiments.reporting import plots
from experiments.reporting.drawing import drawn, library

HEIGHT, WIDTH, BYTES = 375, 500, 110_000
BATCH, SIZE = 64, 224


def textured_image(seed: int) -> np.ndarray:
    """An image with detail at all scales, as photographs have: uint8, (375, 500, 3)."""
    import cv2

    rng = np.random.default_rng(seed)
    image = np.full((HEIGHT, WIDTH, 3), 120, np.float32)
    for power, amplitude in enumerate((60, 50, 40, 30, 22, 16, 12), 2):
        shape = HEIGHT * 2**power // 512 + 2, WIDTH * 2**power // 512 + 2, 3
        noise = rng.standard_normal(shape).astype(np.float32)
        image += amplitude * cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    image += 8 * rng.standard_normal((HEIGHT, WIDTH, 1)).astype(np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def write_images(folder: pathlib.Path, count: int) -> float:
    """Writes `count` JPEGs in 8 class folders; returns their mean size in bytes."""
    import cv2

    def encode(image: np.ndarray, quality: int) -> bytes:
        encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        return bytes(encoded.tobytes())

    first = textured_image(0)
    quality = min(range(70, 100), key=lambda q: abs(len(encode(first, q)) - BYTES))
    sizes = []
    for index in range(count):
        path = folder / "train" / f"class{index % 8}" / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        encoded = encode(textured_image(index), quality)
        path.write_bytes(encoded)
        sizes.append(len(encoded))
    return statistics.mean(sizes)


@contextlib.contextmanager
def our_batches(folder: pathlib.Path, threads: int, processes: int = 0) -> Iterator[Any]:
    """The stream that training reads, without the device."""
    source = sources.open_source("folder", str(folder), "train")
    batches: Any = streaming.train_batches(
        source,
        seed=0,
        batch_size=BATCH,
        image_size=SIZE,
        workers=streaming.Workers(threads, processes),
    )
    with contextlib.closing(batches):
        yield batches


@contextlib.contextmanager
def tf_batches(folder: pathlib.Path, method: str) -> Iterator[Any]:
    """The same work as a tf.data pipeline."""
    import tensorflow as tf

    def load(path: Any) -> Any:
        encoded = tf.io.read_file(path)
        whole_image = tf.zeros((1, 0, 4))
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(encoded),
            whole_image,
            min_object_covered=0.0,
            area_range=(0.08, 1.0),
            aspect_ratio_range=(3 / 4, 4 / 3),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        y, x, _ = tf.unstack(begin)
        height, width, _ = tf.unstack(size)
        image = tf.image.decode_and_crop_jpeg(encoded, tf.stack([y, x, height, width]), channels=3)
        image = tf.image.resize(image, [SIZE, SIZE], method=method)
        return tf.image.random_flip_left_right(image)

    paths = sorted(str(path) for path in (folder / "train").glob("*/*.jpg"))
    dataset = tf.data.Dataset.from_tensor_slices(paths).shuffle(len(paths)).repeat()
    dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE).batch(BATCH)
    yield dataset.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()


def images_per_second(batches: Any, seconds: float) -> float:
    """Images a second over `seconds`, after the first batches, which fill the buffers."""
    for _ in range(4):
        next(batches)
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        next(batches)
        count += BATCH
    return count / elapsed


def compare_streams(
    folder: pathlib.Path, workers: Sequence[int], seconds: float, repeats: int
) -> dict[str, float]:
    """Median images a second of every pipeline, by name."""
    cores = os.cpu_count() or 1
    pipelines: dict[str, Callable[[], Any]] = {}
    for n in workers:
        pipelines[f"{n} threads"] = functools.partial(our_batches, folder, n)
    for n in workers:
        if n <= cores:
            pipelines[f"{n} processes"] = functools.partial(our_batches, folder, 1, n)
    try:
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")
        for method in ("bicubic", "bilinear"):
            pipelines[f"tf.data {method}"] = functools.partial(tf_batches, folder, method)
    except ModuleNotFoundError:
        print("tf.data is left out, since TensorFlow is not installed: pip install '.[prepare]'")
    rates: dict[str, list[float]] = {name: [] for name in pipelines}
    for _ in range(repeats):
        for name, pipeline in pipelines.items():
            with pipeline() as batches:
                rates[name].append(images_per_second(batches, seconds))
            del batches  # or tf.data goes on reading ahead beside the next one
    return {name: statistics.median(values) for name, values in rates.items()}


def on_the_device(repeats: int, examples: int = 50_000) -> dict[str, float]:
    """Median seconds of a batch by itself and of ResNet-20's training step, and their share."""
    config = Config(topology="dense", optimizer="sgd", epochs=1)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (examples, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, examples)
    mesh = meshes.make_mesh(config)
    dataset = on_device.make_dataset((images, labels), (images[:1], labels[:1]), 10, mesh)
    config = dataclasses.replace(config, augmentation="crop_flip")
    loaded = data.DeviceData(dataset, config, data.CorruptExamples(0), mesh)
    model = programs.compile_model(config, loaded)
    method = programs.compile_method(config, loaded, model)
    state = method.start(*model.init(np.int32(0)), np.int32(0))
    batches = loaded.train_batches(seed=0, first_step=0)
    state, measured = method.step(state, *next(batches))
    measured["loss"].block_until_ready()
    epochs, steps = [], []
    for repeat in range(repeats):
        start = time.perf_counter()
        batches = loaded.train_batches(seed=repeat, first_step=0)
        for _ in range(loaded.steps_per_epoch):  # the epoch's order is computed with the first
            batch = next(batches)
        batch.images.block_until_ready()
        epochs.append(time.perf_counter() - start)
        for _ in range(3):
            start = time.perf_counter()
            state, measured = method.step(state, *batch)
            measured["loss"].block_until_ready()
            steps.append(time.perf_counter() - start)
    epoch, step = statistics.median(epochs), statistics.median(steps)
    return {
        "epoch_seconds_without_model": epoch,
        "step_seconds": step,
        "share_of_training": epoch / (loaded.steps_per_epoch * step),
    }


@drawn
def draw(rates: dict[str, float], path: pathlib.Path) -> None:
    """Images a second against workers, with tf.data's as lines."""
    figure = library().figure.Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for kind, marker in (("threads", "o"), ("processes", "s")):
        points = sorted(
            (int(name.split()[0]), rate) for name, rate in rates.items() if name.endswith(kind)
        )
        axes.plot(*zip(*points, strict=True), marker=marker, label=f"experiments.data, {kind}")
    for name, style in (("tf.data bicubic", "--"), ("tf.data bilinear", ":")):
        if name in rates:
            axes.axhline(rates[name], color="black", linestyle=style, label=name)
    axes.set(xlabel="workers", ylabel="images / s", ylim=(0, None))
    axes.xaxis.set_major_locator(library().ticker.MaxNLocator(integer=True))
    axes.set_title(f"{WIDTH}x{HEIGHT} JPEGs to {SIZE}x{SIZE}, {os.cpu_count()} cores")
    axes.legend()
    plots.save(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = measuring.parser(
        "input_pipeline", "Streamed JPEGs against tf.data; the device's images."
    )
    parser.add_argument("--images", type=int, default=512, help="JPEGs to make")
    parser.add_argument("--seconds", type=float, default=4, help="length of a measurement")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each pipeline")
    parser.add_argument("--workers", default="1,2,3,4", help="numbers of threads or processes")
    parser.add_argument("--plot", type=measuring.output, metavar="FILE", help="PNG of the rates")
    argv = sys.argv[1:] if argv is None else argv
    asked = parser.parse_args(argv)
    workers = [int(word) for word in asked.workers.split(",") if word.isdigit()]
    if min(asked.images // BATCH, asked.repeats, *workers, len(workers)) < 1 or asked.seconds <= 0:
        parser.error(
            f"--images must be at least {BATCH}, --repeats and --workers at least 1, and --seconds"
            " above 0"
        )
    with tempfile.TemporaryDirectory() as folder:
        size = write_images(pathlib.Path(folder), asked.images)
        print(f"{asked.images} JPEGs of {WIDTH}x{HEIGHT}, {size / 1000:.0f} KB on average")
        rates = compare_streams(pathlib.Path(folder), workers, asked.seconds, asked.repeats)
    for name, rate in rates.items():
        print(f"{name:>18} {rate:>7.0f} images/s")
    best = max(rate for name, rate in rates.items() if not name.startswith("tf.data"))
    ratios = {name: best / rate for name, rate in rates.items() if name.startswith("tf.data")}
    for name, ratio in ratios.items():
        print(f"best of ours over {name}: {ratio:.2f}")
    device = on_the_device(asked.repeats)
    print(
        "on the device, without a model: an epoch of 50,000 images takes"
        f" {device['epoch_seconds_without_model']:.2f} s,"
        f" {device['share_of_training']:.2%} of ResNet-20's training steps"
    )
    if asked.plot:
        draw(rates, asked.plot)
    result = {
        "jpeg_bytes": size, "images_per_second": rates, "ratio": ratios, "on_device": device
    }  # fmt: skip
    measuring.append(asked, parser, argv, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
