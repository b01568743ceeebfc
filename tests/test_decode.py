"""Decoding against Pillow, and colours worked by hand."""

import io
import math
import struct
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from experiments.data import decode
from experiments.data.errors import CorruptImageError

# Bilinear weights are rounded to 1/2048 in OpenCV and kept in floating point in Pillow.
TOLERANCE = 1


def textured(height, width, channels=3, seed=0):
    """A picture with detail at every scale, as photographs have."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, channels), 128.0)
    for cells, amplitude in ((3, 40), (12, 30), (48, 25)):
        coarse = rng.standard_normal((cells, cells, channels)).astype(np.float32)
        fine = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
        image += amplitude * fine.reshape(height, width, channels)
    return np.clip(image, 0, 255).astype(np.uint8)


def encode(pixels, kind="JPEG", **options):
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **options)
    return file.getvalue()


def solid(mode, colour):
    return Image.new(mode, (24, 16), colour)


def pillow_crop(encoded, crop, size, scale):
    """The oracle: Pillow's scaled decoding, crop, and bilinear affine map without antialiasing."""
    image = Image.open(io.BytesIO(encoded))
    width, height = image.size
    image.draft("RGB", (width // scale, height // scale))
    assert image.size == (math.ceil(width / scale), math.ceil(height / scale))
    top, left, rows, columns = crop
    rows, columns = math.floor(rows / scale + 0.5), math.floor(columns / scale + 0.5)
    left = min(math.floor(left / scale + 0.5), image.width - columns)
    top = min(math.floor(top / scale + 0.5), image.height - rows)
    cut = image.convert("RGB").crop((left, top, left + columns, top + rows))
    affine = (columns / size, 0, 0, 0, rows / size, 0)
    return np.asarray(
        cut.transform((size, size), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    )


def largest_difference(one, other):
    assert one.shape == other.shape
    assert one.dtype == other.dtype == np.uint8
    return np.abs(one.astype(int) - other.astype(int)).max()


PHOTO = textured(187, 250)
PHOTO_JPEG = encode(PHOTO, quality=90)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subsampling": 0},
        {"subsampling": 1},
        {"progressive": True},
        {"keep_rgb": True},
        {"quality": 20, "restart_marker_blocks": 3},
    ],
)
def test_jpegs_decode_to_the_pixels_of_pillow(options):
    encoded = encode(PHOTO, **options)
    pixels = decode.decode(encoded)
    assert largest_difference(pixels, np.asarray(Image.open(io.BytesIO(encoded)))) == 0
    assert decode.image_size(encoded) == PHOTO.shape[:2]


def test_grayscale_is_repeated_over_the_channels():
    encoded = encode(PHOTO[..., 0])
    pixels = decode.decode(encoded)
    expected = np.asarray(Image.open(io.BytesIO(encoded)))
    assert expected.ndim == 2
    for channel in range(3):
        np.testing.assert_array_equal(pixels[..., channel], expected)


@pytest.mark.parametrize(
    ("crop", "size", "scale"),
    [
        ((0, 0, 187, 250), 48, 2),  # 4 would leave 47 rows, one too few
        ((0, 0, 187, 250), 46, 4),
        ((0, 0, 187, 250), 23, 8),
        ((0, 0, 187, 250), 224, 1),
        ((21, 33, 97, 95), 48, 1),
        ((21, 33, 96, 97), 48, 2),
        ((91, 153, 96, 97), 24, 4),  # up to the bottom right corner
        ((186, 249, 1, 1), 5, 1),
        ((3, 4, 50, 50), 50, 1),
    ],
)
def test_a_crop_is_decoded_at_the_resolution_it_needs(crop, size, scale):
    pixels = decode.decode_crop(PHOTO_JPEG, crop, size)
    assert largest_difference(pixels, pillow_crop(PHOTO_JPEG, crop, size, scale)) <= TOLERANCE
    for other in {1, 2, 4, 8} - {scale}:
        if min(crop[2:]) >= other:
            other_pixels = pillow_crop(PHOTO_JPEG, crop, size, other)
            assert largest_difference(pixels, other_pixels) > 5 * TOLERANCE


@given(data=st.data(), size=st.integers(8, 64))
def test_any_crop_has_the_pixels_of_pillow(data, size):
    top, left = data.draw(st.integers(0, 186)), data.draw(st.integers(0, 249))
    height, width = data.draw(st.integers(1, 187 - top)), data.draw(st.integers(1, 250 - left))
    crop = (top, left, height, width)
    scale = max(s for s in (1, 2, 4, 8) if s == 1 or min(height / s, width / s) >= size)
    pixels = decode.decode_crop(PHOTO_JPEG, np.array(crop, np.int32), size)
    assert largest_difference(pixels, pillow_crop(PHOTO_JPEG, crop, size, scale)) <= TOLERANCE


def test_flip_and_out():
    crop = (10, 20, 60, 90)
    plain = decode.decode_crop(PHOTO_JPEG, crop, 32)
    out = np.zeros((3, 32, 32, 3), np.uint8)
    decode.decode_crop(PHOTO_JPEG, crop, 32, out=out[0])
    decode.decode_crop(PHOTO_JPEG, crop, 32, flip=True, out=out[2])
    np.testing.assert_array_equal(out[0], plain)
    np.testing.assert_array_equal(out[1], 0)
    np.testing.assert_array_equal(out[2], plain[:, ::-1])


def test_other_formats_are_reduced_by_averaging():
    pixels = textured(64, 96)
    expected = pixels.reshape(16, 4, 24, 4, 3).mean(axis=(1, 3))[2:14, 5:17]
    found = decode.decode_crop(encode(pixels, "PNG"), (8, 20, 48, 48), 12)
    np.testing.assert_allclose(found, expected, atol=0.51)


@pytest.mark.parametrize(
    "crop", [(0, 0, 188, 250), (0, 0, 187, 251), (187, 0, 1, 1), (-1, 0, 9, 9), (0, 0, 0, 9)]
)
def test_a_crop_outside_the_image_is_refused(crop):
    with pytest.raises(ValueError, match=r"crop=\(.* does not lie inside the image"):
        decode.decode_crop(PHOTO_JPEG, crop, 224)


# Ink 200, 40, 100 and 30 of 255 leaves (255 - ink) * (255 - 30) / 255 of the light.
INK = (200, 40, 100, 30)
INK_RGB = (48.5, 189.7, 136.8)
INVERTED_INK = tuple(255 - amount for amount in INK)


def without_segment(encoded, marker):
    start = encoded.index(bytes([0xFF, marker]))
    length = int.from_bytes(encoded[start + 2 : start + 4], "big")
    return encoded[:start] + encoded[start + 2 + length :]


def ycck(colour):
    pixels = np.tile(np.array(colour, np.uint8), (16, 24, 1))
    return simplejpeg.encode_jpeg(pixels, 100, colorspace="CMYK", colorsubsampling="444")


@pytest.mark.parametrize("kind", ["adobe", "plain", "ycck", "broken exif", "tiff"])
def test_cmyk_is_converted_to_rgb(kind):
    encoded = {
        "adobe": lambda: encode(solid("CMYK", INK), quality=100),
        # Without Adobe's marker the numbers are the ink, with it 255 less the ink.
        "plain": lambda: without_segment(encode(solid("CMYK", INVERTED_INK), quality=100), 0xEE),
        "ycck": lambda: ycck(INVERTED_INK),
        "broken exif": lambda: encode(
            solid("CMYK", INK), quality=100, exif=b"Exif\0\0MM\0*\xff\xff"
        ),
        "tiff": lambda: encode(solid("CMYK", INK), "TIFF"),
    }[kind]()
    if kind in ("adobe", "plain", "ycck"):
        colorspace = simplejpeg.decode_jpeg_header(encoded)[2]
        assert colorspace == ("YCCK" if kind == "ycck" else "CMYK")
        assert (b"Adobe" in encoded) == (kind != "plain")
    pixels = decode.decode(encoded)
    assert decode.image_size(encoded) == (16, 24)
    np.testing.assert_allclose(pixels, np.broadcast_to(INK_RGB, (16, 24, 3)), atol=2)
    crop = decode.decode_crop(encoded, (2, 2, 12, 12), 6)
    np.testing.assert_allclose(crop, np.broadcast_to(INK_RGB, (6, 6, 3)), atol=2)


def palette_image():
    image = Image.new("P", (24, 16), 1)
    image.putpalette([9, 9, 9, 10, 20, 30])
    return image


@pytest.mark.parametrize(
    ("encoded", "colour"),
    [
        (encode(solid("RGB", (10, 20, 30)), "PNG"), (10, 20, 30)),
        (encode(solid("RGBA", (10, 20, 30, 0)), "PNG"), (10, 20, 30)),
        (encode(solid("LA", (77, 128)), "PNG"), (77, 77, 77)),
        (encode(solid("L", 77), "PNG", transparency=77), (77, 77, 77)),
        (encode(solid("1", 1), "PNG"), (255, 255, 255)),
        (encode(palette_image(), "PNG"), (10, 20, 30)),
        (encode(palette_image(), "PNG", transparency=b"\x80\x00"), (10, 20, 30)),
        (encode(palette_image(), "GIF"), (10, 20, 30)),
        # Of 16 bits the upper 8: 0x1234 is 0x12.
        (encode(np.full((16, 24), 0x1234, np.uint16), "PNG"), (0x12, 0x12, 0x12)),
        (
            # OpenCV's channels are blue, green, red.
            cv2.imencode(".png", np.full((16, 24, 3), (0x30FF, 0x2000, 0x10AA), np.uint16))[
                1
            ].tobytes(),
            (0x10, 0x20, 0x30),
        ),
        (b"P5 24 16 65535\n" + b"\x12\x34" * (24 * 16), (0x12, 0x12, 0x12)),
        (encode(solid("RGB", (10, 20, 30)), "BMP"), (10, 20, 30)),
        (encode(solid("RGB", (10, 20, 30)), "WEBP", lossless=True), (10, 20, 30)),
    ],
)
def test_other_formats_decode_to_rgb_whatever_their_file_is_called(encoded, colour):
    assert decode.image_size(encoded) == (16, 24)
    pixels = decode.decode(encoded)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.broadcast_to(np.uint8(colour), (16, 24, 3)))
    crop = decode.decode_crop(encoded, (0, 0, 10, 10), 20)
    np.testing.assert_array_equal(crop, np.broadcast_to(np.uint8(colour), (20, 20, 3)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_ignored(kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    np.testing.assert_array_equal(
        decode.decode(encode(PHOTO, kind, exif=exif)), decode.decode(encode(PHOTO, kind))
    )


def patched(encoded, marker, offset, value):
    """`encoded` with another byte, `offset` bytes after a marker."""
    position = encoded.index(marker) + len(marker) + offset
    return encoded[:position] + bytes([value]) + encoded[position + 1 :]


@pytest.mark.parametrize(
    "encoded",
    [
        PHOTO_JPEG + b"anything",
        PHOTO_JPEG[:-2] + b"\x12\x34\x56" + PHOTO_JPEG[-2:],
        patched(PHOTO_JPEG, b"JFIF\0", 0, 3),
        patched(PHOTO_JPEG, b"\xff\xda\0\x0c\x03\x01\0\x02\x11\x03\x11", 1, 10),
    ],
    ids=["after the end", "before the end", "revision", "scan parameters"],
)
def test_warnings_that_cost_no_pixel_are_passed_over(encoded):
    np.testing.assert_array_equal(decode.decode(encoded), decode.decode(PHOTO_JPEG))
    assert decode.image_size(encoded) == PHOTO.shape[:2]


def test_unusual_subsampling_is_left_to_pillow():
    # Chroma at half the height alone and at a quarter of the width, which has no name.
    encoded = patched(encode(PHOTO, subsampling=2), b"\xff\xc0\0\x11\x08", 6, 0x42)
    encoded = patched(encoded, b"\xff\xc0\0\x11\x08", 9, 0x12)
    np.testing.assert_array_equal(
        decode.image_size(encoded), Image.open(io.BytesIO(encoded)).size[::-1]
    )


PNG = encode(PHOTO, "PNG")
CMYK_JPEG = encode(Image.fromarray(PHOTO).convert("CMYK"))
PROGRESSIVE = encode(PHOTO, progressive=True)


def resized_header(encoded, height, width):
    """A JPEG or PNG whose header claims another size."""
    if encoded.startswith(b"\x89PNG"):
        start = encoded.index(b"IHDR")
        sizes = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        header = b"IHDR" + sizes + encoded[start + 12 : start + 17]
        checked = header + zlib.crc32(header).to_bytes(4, "big")
        return encoded[:start] + checked + encoded[start + 21 :]
    start = encoded.index(b"\xff\xc0") + 5
    return encoded[:start] + struct.pack(">HH", height, width) + encoded[start + 4 :]


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (b"", "empty"),
        (b"<html>404</html>", "not an image in one of the formats JPEG, PNG"),
        (b"\xff\xd8\xff\xe0", "damaged|not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (PHOTO_JPEG[:300], "damaged|not an image"),
        (PHOTO_JPEG[: len(PHOTO_JPEG) // 2], "Premature end"),
        (PHOTO_JPEG[:-2], "Premature end"),
        (PHOTO_JPEG[:-1], "Premature end"),
        (PROGRESSIVE[: len(PROGRESSIVE) // 2], "Premature end"),
        (PHOTO_JPEG[:2000] + bytes(2000) + PHOTO_JPEG[4000:], "damaged JPEG: Corrupt JPEG data"),
        (patched(PHOTO_JPEG, b"JFIF\0", 0, 3)[:4000], "damaged image: .*truncated"),
        (CMYK_JPEG[: len(CMYK_JPEG) // 2], "damaged image: .*truncated"),
        (PNG[:20], "damaged|not an image"),
        (PNG[: len(PNG) // 2], "damaged image: "),
        (patched(PNG, b"IDAT", 5000, 1), "damaged image: "),
    ],
)
def test_damaged_images_are_refused(encoded, message):
    with pytest.raises(CorruptImageError, match=message):
        decode.decode(encoded)
    with pytest.raises(CorruptImageError, match=message):
        decode.decode_crop(encoded, (0, 0, 4, 4), 4)


@pytest.mark.parametrize(("height", "width"), [(9460, 9460), (60000, 65000)])
@pytest.mark.parametrize("encoded", [PHOTO_JPEG, PNG, CMYK_JPEG], ids=["jpeg", "png", "cmyk"])
@pytest.mark.parametrize("function", [decode.decode, decode.image_size])
def test_decompression_bombs_are_refused(encoded, height, width, function):
    assert 9459**2 < decode.MAX_PIXELS < 9460**2
    with pytest.raises(CorruptImageError, match=r"more than 89478485|decompression bomb"):
        function(resized_header(encoded, height, width))


@given(
    encoded=st.sampled_from([PHOTO_JPEG, PNG, CMYK_JPEG, PROGRESSIVE]),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255))),
    kept=st.floats(0, 1),
)
def test_no_other_error_whatever_the_bytes(encoded, changes, kept):
    damaged = bytearray(encoded)
    for place, value in changes:
        damaged[int(len(damaged) * place)] = value
    damaged = bytes(damaged[: round(kept * len(damaged))])
    try:
        height, width = decode.image_size(damaged)
        pixels = decode.decode(damaged)
    except CorruptImageError:
        return
    assert pixels.shape == (height, width, 3)
