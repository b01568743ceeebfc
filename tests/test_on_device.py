"""Datasets on the device: loading, the order of an epoch, crops and flips, evaluation."""

import io
import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from experiments import data, programs
from experiments.config import Config, ConfigError
from experiments.data import on_device
from experiments.data.corrupt import CorruptExamples
from experiments.data.errors import CorruptImageError, DataError
from experiments.data.on_device import PADDING, Split
from experiments.data.sources import Example


@pytest.fixture(scope="module")
def digits():
    return on_device.make_dataset(*on_device.load_digits(), num_classes=10)


def numbered(examples=40, height=5, width=6, channels=1):
    """Images of which every pixel has a value of its own within its image, none of them 0."""
    pixels = 1 + np.arange(height * width * channels).reshape(1, height, width, channels)
    images = (pixels + 3 * np.arange(examples)[:, None, None, None]) % 255 + 1
    return Split(jnp.asarray(images, jnp.uint8), jnp.arange(examples, dtype=jnp.int32))


def test_digits_are_split_by_class(digits):
    train, test = np.asarray(digits.train.labels), np.asarray(digits.test.labels)
    assert len(train) + len(test) == 1797
    assert digits.train.images.shape == (len(train), 8, 8, 1)
    assert digits.train.images.dtype == digits.test.images.dtype == jnp.uint8
    assert digits.train.labels.dtype == digits.test.labels.dtype == jnp.int32
    shares = np.bincount(test) / np.bincount(np.concatenate([train, test]))
    assert len(shares) == digits.num_classes == 10
    np.testing.assert_allclose(shares, 0.2, atol=0.005)


def test_split_holds_every_example_once():
    labels = np.array([0, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0])
    train, test = on_device.split_by_class(labels)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(12))
    # The fifth 0 and the fifth 1.
    np.testing.assert_array_equal(test, [5, 9])


def test_mean_and_std_are_those_of_the_training_images_by_channel():
    rng = np.random.default_rng(0)
    images = rng.integers(0, [100, 200, 256], (30, 4, 5, 3)).astype(np.uint8)
    other = np.zeros((2, 4, 5, 3), np.uint8)
    dataset = on_device.make_dataset((images, np.arange(30)), (other, np.arange(2)), 30)
    np.testing.assert_allclose(dataset.mean, images.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(dataset.std, images.std((0, 1, 2)), rtol=1e-6)
    # A channel that is the same everywhere is not divided by 0.
    dataset = on_device.make_dataset((other, np.arange(2)), (other, np.arange(2)), 2)
    np.testing.assert_array_equal(dataset.std, 1)


def test_order_is_given_by_seed_and_epoch_alone():
    first = np.asarray(on_device.epoch_order(3, 5, examples=100))
    np.testing.assert_array_equal(np.sort(first), np.arange(100))
    np.testing.assert_array_equal(first, on_device.epoch_order(3, 5, examples=100))
    others = [on_device.epoch_order(*pair, examples=100) for pair in ((3, 6), (4, 5), (5, 3))]
    assert all((first != np.asarray(other)).any() for other in others)


def test_train_batches_follow_the_order_and_start_anywhere():
    split = numbered(examples=40)
    batches = on_device.train_batches(split, 1, 0, batch_size=12, augmentation="none")
    labels = [np.asarray(next(batches).labels) for _ in range(9)]
    for epoch in range(3):
        order = np.asarray(on_device.epoch_order(1, epoch, examples=40))[:36]
        np.testing.assert_array_equal(np.concatenate(labels[3 * epoch : 3 * epoch + 3]), order)
    for start in (2, 3, 4, 7):
        later = on_device.train_batches(split, 1, start, batch_size=12, augmentation="none")
        images, found = next(later)
        np.testing.assert_array_equal(found, labels[start])
        np.testing.assert_array_equal(images, np.asarray(split.images)[labels[start]])


@pytest.mark.parametrize("augmentation", ["crop", "crop_flip"])
def test_every_image_is_a_crop_of_its_padded_self(augmentation):
    """Every crop is looked up among all shifts of the padded image, flipped or not, in NumPy."""
    split = numbered(examples=40)
    height, width = split.images.shape[1:3]
    padded = np.pad(
        np.asarray(split.images), [(0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0)]
    )
    batches = on_device.train_batches(split, 0, 0, batch_size=40, augmentation=augmentation)
    found = []
    for _ in range(20):
        images, labels = map(np.asarray, next(batches))
        assert images.dtype == np.uint8
        for image, label in zip(images, labels, strict=True):
            matches = [
                (y, x, flipped)
                for y in range(2 * PADDING + 1)
                for x in range(2 * PADDING + 1)
                for flipped in (False, True)
                if (crop := padded[label, y : y + height, x : x + width]).any()
                and (image == (crop[:, ::-1] if flipped else crop)).all()
            ]
            found += matches if image.any() else []
            assert matches or not image.any()
    y, x, flipped = np.array(found).T
    # 800 images: each of the 9 shifts of an axis about 89 times, of which some are all black.
    assert (np.bincount(y, minlength=9) > 40).all()
    assert (np.bincount(x, minlength=9) > 40).all()
    share = flipped.mean()
    assert abs(share - 0.5) < 0.06 if augmentation == "crop_flip" else share < 0.06


def test_batches_of_several_seeds_together_are_those_of_each_alone():
    split, seeds = numbered(), jnp.arange(3)
    orders = jnp.stack([on_device.epoch_order(seed, 4, examples=40) for seed in range(3)])

    def one(order, seed):
        return on_device.take_batch(
            split, order, seed, 4, 2, batch_size=8, augmentation="crop_flip"
        )

    images, labels = jax.jit(jax.vmap(one))(orders, seeds)
    assert images.shape == (3, 8, 5, 6, 1)
    for seed in range(3):
        alone = jax.jit(one)(orders[seed], seed)
        np.testing.assert_array_equal(images[seed], alone.images)
        np.testing.assert_array_equal(labels[seed], alone.labels)
    assert (np.asarray(images[0]) != np.asarray(images[1])).any()


def test_crops_differ_between_batches_epochs_and_seeds():
    split = Split(numbered(1).images, jnp.zeros(1, jnp.int32))
    crops = [
        np.asarray(
            on_device.take_batch(
                split, jnp.zeros(8, jnp.int32), seed, epoch, index, batch_size=4,
                augmentation="crop",
            ).images
        )
        for seed, epoch, index in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]  # fmt: skip
    assert all((a != b).any() for i, a in enumerate(crops) for b in crops[:i])


@pytest.mark.parametrize(("examples", "batch_size"), [(10, 4), (12, 4), (3, 8), (1, 1)])
def test_eval_batches_hold_every_example_once(examples, batch_size):
    split = numbered(examples, 2, 2)
    batches = on_device.eval_batches(split, batch_size)
    assert all(batch.images.shape == (batch_size, 2, 2, 1) for batch in batches)
    weights = np.concatenate([batch.weights for batch in batches]).astype(bool)
    assert weights.sum() == examples
    seen = np.concatenate([batch.labels for batch in batches])[weights]
    np.testing.assert_array_equal(seen, split.labels)
    images = np.concatenate([b.images for b in batches])[weights]
    np.testing.assert_array_equal(images, split.images)


def test_evaluation_counts_every_test_example_once(digits):
    """Against one unpadded batch, normalised in NumPy; 355 images do not fill batches of 100."""
    config = Config(model="mlp", hidden=8, batch_size=100, mesh_data=1)
    loaded = data.load(config)
    model = programs.compile_model(config, loaded)
    params, batch_stats = model.init(jnp.int32(0))
    sums = [model.evaluate(params, batch_stats, batch) for batch in loaded.eval_batches()]
    train, test = (np.asarray(s.images, np.float64) for s in (digits.train, digits.test))
    images = jnp.asarray((test - train.mean()) / train.std(), jnp.float32)
    variables = {"params": params, "batch_stats": batch_stats}
    logits = np.asarray(model.functions.module.apply(variables, images, train=False))
    labels = np.asarray(digits.test.labels)
    assert len(labels) % 100 != 0
    examples, correct, losses = (sum(map(float, column)) for column in zip(*sums, strict=True))
    assert examples == len(labels)
    assert correct == (logits.argmax(-1) == labels).sum()
    shifted = logits - logits.max(-1, keepdims=True)
    expected = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(labels)), labels]
    np.testing.assert_allclose(losses, expected.sum(), rtol=1e-5)


class Pngs:
    """A source in memory, of which the examples in `broken` are damaged."""

    split = "train"
    num_classes = 10

    def __init__(self, images, broken=()):
        import cv2

        self.images = images
        self.image_shape = images.shape[1:]
        self.encoded = [
            cv2.imencode(".png", image[..., ::-1])[1].tobytes()[: 60 if i in broken else None]
            for i, image in enumerate(images)
        ]

    def __len__(self):
        return len(self.encoded)

    def read(self, indices):
        return [Example(self.encoded[i], i % 10) for i in indices]

    def name(self, index):
        return f"record {index}"


@pytest.mark.parametrize("channels", [1, 3])
def test_a_source_is_decoded_whole(channels):
    images = np.random.default_rng(0).integers(0, 256, (2050, 3, 4, channels)).astype(np.uint8)
    found, labels = on_device.load_split(Pngs(images), CorruptExamples(0))
    np.testing.assert_array_equal(found, images)
    np.testing.assert_array_equal(labels, np.arange(2050) % 10)


def test_images_that_cannot_be_decoded_are_left_out_up_to_max_corrupt():
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3)).astype(np.uint8)
    source = Pngs(images, broken=(4, 17))
    with pytest.raises(CorruptImageError, match=r"record 17.*max_corrupt=1"):
        on_device.load_split(source, CorruptExamples(1, say=lambda line: None))
    said = []
    corrupt = CorruptExamples(2, said.append)
    found, labels = on_device.load_split(source, corrupt)
    assert (len(corrupt), len(said)) == (2, 2)
    assert "record 4" in said[0]
    assert "1 of at most 2" in said[0]
    good = np.delete(np.arange(20), [4, 17])
    np.testing.assert_array_equal(found, images[good])
    np.testing.assert_array_equal(labels, good % 10)


def test_a_split_of_which_nothing_is_left_is_refused():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1)).astype(np.uint8)
    source = Pngs(images, broken=(0, 1))
    with pytest.raises(DataError, match="split 'train' has no image"):
        on_device.load_split(source, CorruptExamples(2, say=lambda line: None))


def test_pngs_follow_the_rules_of_other_images():
    """An orientation in EXIF is ignored; a header that asks for gigabytes is a corrupt image."""
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3)).astype(np.uint8)
    source, buffer, exif = Pngs(images), io.BytesIO(), PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    PIL.Image.fromarray(images[0]).save(buffer, "PNG", exif=exif)
    source.encoded[0] = buffer.getvalue()
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + source.encoded[1][24:29]
    checksum = struct.pack(">I", zlib.crc32(header))
    source.encoded[1] = source.encoded[1][:12] + header + checksum + source.encoded[1][33:]
    said = []
    found, labels = on_device.load_split(source, CorruptExamples(1, said.append))
    np.testing.assert_array_equal(found, images[:1])
    np.testing.assert_array_equal(labels, [0])
    assert "record 1" in said[0]
    assert "60000" in said[0]


def test_an_image_of_another_shape_is_named():
    source = Pngs(np.zeros((3, 4, 4, 1), np.uint8))
    source.image_shape = (4, 5, 1)
    with pytest.raises(DataError, match=r"record 0 has shape \(4, 4, 1\).*\(4, 5, 1\)"):
        on_device.load_split(source, CorruptExamples(0))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (Config(batch_size=2000), "batch_size=2000 must be at most 14"),
        (Config(num_classes=7), "num_classes=7 must be 10, the number of classes of digits"),
        (Config(storage="stream"), "storage='stream' must be 'auto' or 'device'"),
        (Config(train_split="train[:9%]"), "train_split='train.*' must be 'train' for dataset=dig"),
        (Config(label="coarse_label"), "label='coarse_label' must be 'label'"),
        (
            Config(augmentation="random_resized_crop"),
            "augmentation='random_resized_crop' must be auto, none, crop or crop_flip",
        ),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(config, named):
    with pytest.raises(ConfigError, match=named):
        data.steps_per_epoch(config, data.load(config))
