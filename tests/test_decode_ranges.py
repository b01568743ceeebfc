"""Values of more than 8 bits, and formats beside JPEG and PNG, against arrays written by hand."""

import io
import struct

import cv2
import numpy as np
import pytest
from PIL import Image

from experiments.data import decode, on_device
from experiments.data.errors import CorruptImageError

GREYS = np.arange(256).reshape(16, 16)
COLOURS = np.stack([GREYS, GREYS[::-1], GREYS.T], axis=-1)


def tiff(values, order="<", photometric=None, extra=None):
    """An uncompressed TIFF of one strip; `extra` says what a last channel is (1, 2: an alpha)."""
    values = np.asarray(values)
    height, width, *channels = values.shape
    count = channels[0] if channels else 1
    if photometric is None:
        photometric = 2 if count > 2 else 1
    bits, kind = values.dtype.itemsize * 8, {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    pixels = values.astype(values.dtype.newbyteorder(order)).tobytes()
    tags = {
        256: [width], 257: [height], 258: [bits] * count, 259: [1], 262: [photometric],
        273: [1000], 277: [count], 278: [height], 279: [len(pixels)], 339: [kind] * count,
    }  # fmt: skip
    if extra is not None:
        tags[338] = [extra]
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(tags))
    arrays, start = b"", 8 + 2 + 12 * len(tags) + 4
    for tag, numbers in sorted(tags.items()):
        field = struct.pack(f"{order}{len(numbers)}H", *numbers)
        if len(field) > 4:
            arrays, field = arrays + field, struct.pack(f"{order}I", start + len(arrays))
        head += struct.pack(f"{order}HHI", tag, 3, len(numbers)) + field.ljust(4, b"\0")
    return (head + bytes(4) + arrays).ljust(1000, b"\0") + pixels


def packed_12_bits(values):
    """A TIFF whose values of 12 bits take one and a half bytes each."""
    high, low = values.reshape(-1, 2).T
    triples = np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], axis=-1)
    encoded = bytearray(tiff(triples.astype(np.uint8).reshape(len(values), -1)))
    for tag, number in ((256, values.shape[1]), (258, 12)):
        place = encoded.index(struct.pack("<HHI", tag, 3, 1)) + 8
        encoded[place : place + 2] = struct.pack("<H", number)
    return bytes(encoded)


def png(values):
    """OpenCV's channels are blue, green, red."""
    values = values[..., [2, 1, 0, *range(3, values.shape[-1])]] if values.ndim == 3 else values
    return cv2.imencode(".png", values)[1].tobytes()


def pillow(values, kind, **options):
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind, **options)
    return file.getvalue()


def pnm(magic, values, most):
    height, width = values.shape[:2]
    header = f"{magic} {width} {height} {most}\n".encode()
    return header + values.astype(">u2" if most > 255 else "u1").tobytes()


SIXTEEN = GREYS * 256 + GREYS[::-1]
COLOUR_16 = COLOURS * 256 + 255 - COLOURS
ALPHA_16 = np.concatenate([COLOUR_16, SIXTEEN[..., None]], axis=-1)
HALF = np.full((16, 16, 1), 128)


def u16(values):
    return values.astype(np.uint16)


def undone(values):
    return values * 255 // 128


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "i4", "f4"])
def test_grey_tiffs(dtype, order):
    values = u16(SIXTEEN) if dtype == "u2" else GREYS.astype(dtype)
    check(tiff(values, order), GREYS)


@pytest.mark.parametrize(
    ("encoded", "expected"),
    [
        (tiff(GREYS.astype(np.uint32)), GREYS),
        (tiff((GREYS // 2).astype(np.int8)), GREYS // 2),
        (pillow(GREYS.astype(np.int32), "TIFF", compression="tiff_lzw"), GREYS),
        (pillow(GREYS.astype(np.float32), "TIFF"), GREYS),
        (packed_12_bits(GREYS * 16 + 7), GREYS),
        # 0 is white.
        (tiff(u16(SIXTEEN), photometric=0), 255 - GREYS),
        (tiff((GREYS / 255).astype(np.float32), photometric=0), 255 - GREYS),
        # Floating-point numbers up to 1, and whole ones up to 255.
        (tiff((GREYS / 255).astype(np.float32)), GREYS),
        (tiff(np.full((2, 2), 0.3, np.float32)), np.full((2, 2), 76)),  # 76.5, to even
        (tiff(np.ones((2, 2), np.float32)), np.full((2, 2), 255)),
        (tiff(np.zeros((2, 2), np.float32)), np.zeros((2, 2))),
        (b"Pf\n16 16\n-1\n" + (GREYS[::-1] / 255).astype("<f4").tobytes(), GREYS),
        # 16 bits in other formats; what is black in them is black.
        (png(u16(SIXTEEN)), GREYS),
        (png(u16(COLOUR_16)), COLOURS),
        (png(u16(ALPHA_16)), COLOURS),
        (png(np.zeros((4, 4), np.uint16)), np.zeros((4, 4))),
        (png(np.zeros((4, 4, 3), np.uint16)), np.zeros((4, 4))),
        (tiff(u16(COLOUR_16)), COLOURS),
        (tiff(u16(COLOUR_16), ">"), COLOURS),
        (tiff(u16(ALPHA_16), extra=2), COLOURS),
        (pnm("P5", SIXTEEN, 65535), GREYS),
        (pnm("P5", GREYS * 16 + 7, 4095), GREYS),
        (pnm("P6", COLOURS * 257, 65535), COLOURS),
        (pnm("P5", GREYS // 16, 15), GREYS // 16 * 17),
        # 8 bits and fewer.
        (pnm("P5", GREYS, 255), GREYS),
        (pnm("P6", COLOURS, 255), COLOURS),
        (b"P4 16 2\n" + bytes([0b10100000, 1, 255, 0]), 255 * (1 - np.unpackbits(
            np.array([[0b10100000, 1], [255, 0]], np.uint8), axis=1))),
        (b"P2 2 1 255\n0 77\n", [[0, 77]]),
        (tiff(np.uint8(np.concatenate([COLOURS, HALF], -1)), extra=2), COLOURS),
        # Multiplied by an alpha of 128 of 255 already, which is undone.
        (tiff(np.uint8(np.concatenate([COLOURS // 2, HALF], -1)), extra=1), undone(COLOURS // 2)),
        (tiff(np.uint8(np.stack([GREYS // 2, HALF[..., 0]], -1)), extra=1), undone(GREYS // 2)),
        (tiff(np.uint8(np.stack([GREYS, HALF[..., 0]], -1)), extra=2), GREYS),
        (pillow(np.uint8(COLOURS), "JPEG2000"), COLOURS),
        (pillow(u16(SIXTEEN), "JPEG2000"), GREYS),
        (pillow(np.uint8(COLOURS), "WEBP", lossless=True), COLOURS),
    ],
)  # fmt: skip
def test_values_of_every_kind(encoded, expected):
    check(encoded, expected)


def check(encoded, expected):
    """All three ways to decode give the pixels that were written."""
    expected = np.asarray(expected)
    if expected.ndim == 2:
        expected = np.repeat(expected[..., None], 3, axis=-1)
    assert decode.image_size(encoded) == expected.shape[:2]
    for pixels in (decode.decode(encoded), on_device._decode(encoded)):
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, expected)
    side = min(expected.shape[:2])
    crop = decode.decode_crop(encoded, (0, 0, side, side), side)
    np.testing.assert_array_equal(crop, expected[:side, :side])


def test_avif():
    smooth = np.uint8(np.linspace(0, 255, 64)[:, None, None] + np.zeros((64, 48, 3)))
    encoded = pillow(smooth, "AVIF", quality=100, subsampling="4:4:4")
    assert decode.image_size(encoded) == (64, 48)
    np.testing.assert_allclose(decode.decode(encoded), smooth, atol=3)


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (tiff(np.array([[-1, 9]], np.int32)), "32-bit or signed integers from -1 to 9"),
        (tiff(np.array([[0, 256]], np.int32)), "from 0 to 256, .* must be 0 to 255, or have 8"),
        (tiff(np.array([[0, 65535]], np.uint32)), "from 0 to 65535"),
        (tiff(np.array([[-3, 9]], np.int16)), "signed integers from -3 to 9"),
        (tiff(np.array([[-3, 9]], np.int8)), "signed integers from -3 to 9"),
        (tiff(np.array([[0, 1.5]], np.float32)), "floating-point numbers from 0 to 1.5, "),
        (tiff(np.array([[-1, 1]], np.float32)), "floating-point numbers from -1 to 1, "),
        (tiff(np.array([[0, 256]], np.float32)), "from 0 to 256, .* whole numbers from 0 to 255"),
        (tiff(np.array([[0, np.nan]], np.float32)), "from nan to nan"),
        (tiff(np.array([[0, np.inf]], np.float32)), "from 0 to inf"),
        (png(u16(GREYS)), "16 bits, but are at most 255 of 65535"),
        (png(u16(COLOURS)), "16 bits, but are at most 255 of 65535"),
        (tiff(u16(GREYS)), "16 bits, but are at most 255 of 65535"),
        (tiff(u16(COLOURS // 2)), "16 bits, but are at most 127 of 65535"),
        (pnm("P5", GREYS, 65535), "16 bits, but are at most 255 of 65535"),
        (pnm("P6", COLOURS, 65535), "16 bits, but are at most 255 of 65535"),
        (tiff(np.zeros((2, 2), np.float64)), "not an image in one of .*, or its pixels are of"),
    ],
)  # fmt: skip
def test_values_without_a_clear_meaning_are_refused(encoded, message):
    for function in (decode.decode, on_device._decode):
        with pytest.raises(CorruptImageError, match=message):
            function(encoded)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_grey_is_known_by_the_header(kind):
    assert decode.is_grey(pillow(np.uint8(GREYS), kind))
    assert not decode.is_grey(pillow(np.uint8(COLOURS), kind))
    assert decode.is_grey(png(u16(SIXTEEN)))
    assert decode.is_grey(tiff(GREYS.astype(np.float32)))


def test_endings_are_those_of_pillow():
    Image.init()
    for name, endings in decode.FORMATS.items():
        assert set(endings) == {end for end, kind in Image.EXTENSION.items() if kind == name}
