"""Encoded images to pixels: whole, or one crop of them at the size that a model takes.

JPEGs are decoded by libjpeg-turbo (simplejpeg), and everything else by Pillow. An image that is
damaged raises CorruptImageError, which says what is wrong but not with which image: callers know
its name. An EXIF orientation is ignored, as the usual ImageNet pipelines ignore it; transparency is
dropped; of an animation the first picture is taken.

Values of more than 8 bits become 8 bits by a rule for each kind, that no other image matters to:

    16 bits (in TIFF also 12)     the upper 8 (colours in PPM are rounded to 8)
    32 bits, or signed            0 to 255 are taken as they are
    floating-point numbers        0 to 1 is 0 to 255; whole numbers from 0 to 255 as they are

What has no clear meaning by that is refused: every other range, and an image of 16 bits that would
come out black although it is not, since its values need no more than 8.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import AvifImagePlugin, Image, ImageChops, TiffImagePlugin, UnidentifiedImageError

from experiments.data.errors import CorruptImageError

MAX_PIXELS = 89_478_485
"""Larger images are refused before memory is allocated; Pillow's own limit, about 9459 x 9459."""

FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
}
"""What Pillow may take an image for, and the endings of such files. Others of its formats start
programs, have no mark that tells them from other files, or are no pictures."""

MIN_AREA = 0.08
MAX_RATIO = 4 / 3
"""Random crops cover from MIN_AREA to all of the image; the ratio of their sides is at most this.
"""

# Warnings of libjpeg about bytes that no pixel depends on. Other pipelines never see them. It stops
# at the first warning, so Pillow has to decode such a file, which sees an early end but no other
# damage behind it.
_HARMLESS = (
    "extraneous bytes before marker 0xd9",
    "unknown JFIF revision number",
    "Unknown Adobe color transform code",
    "Invalid SOS parameters for sequential JPEG",
)

_ATTEMPTS = 10
# Four numbers an attempt and one for the flip, in Philox's blocks of four. Positions are this far
# apart in the counter, so a change of it changes every crop of every run.
_BLOCKS = 12

# The threads are Grain's; OpenCV's and libavif's own would fight them for the cores.
cv2.setNumThreads(1)
AvifImagePlugin.DEFAULT_MAX_THREADS = 1
# What is wrong with an image is said here, and its name with it.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def is_image(path: str) -> bool:
    """Whether a file begins as one in a format of `FORMATS` does, whatever its name; or OSError."""
    with open(path, "rb") as file:
        try:
            Image.open(file, formats=tuple(FORMATS)).close()
        except Image.DecompressionBombError:
            return True  # which is said of it when it is read
        except Exception:  # of nearly every type, by what the file has in common with an image
            return False
    return True


def image_size(encoded: bytes) -> tuple[int, int]:
    """Height and width in pixels, from the header alone.

    Raises:
      CorruptImageError: it is no image, or one of more than `MAX_PIXELS`.
    """
    size = _jpeg_size(encoded)
    if size is None:
        with _opened(encoded) as image:
            size = image.height, image.width
    return _checked(size)


def is_grey(encoded: bytes) -> bool:
    """Whether it has no colours, by the header alone; raises as `image_size`."""
    if _jpeg_size(encoded) is not None:
        return bool(simplejpeg.decode_jpeg_header(encoded, strict=False)[2] == "Gray")
    with _opened(encoded) as image:
        return image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")


def decode(encoded: bytes) -> npt.NDArray[np.uint8]:
    """All pixels, uint8, (height, width, 3), in RGB; an alpha channel is dropped.

    Raises:
      CorruptImageError: it is no image, is cut off or damaged, or has more than `MAX_PIXELS`.
    """
    return _decode_reduced(encoded, 1)


def decode_crop(
    encoded: bytes,
    crop: Sequence[int] | npt.NDArray[np.int32],
    size: int,
    *,
    flip: bool = False,
    out: npt.NDArray[np.uint8] | None = None,
) -> npt.NDArray[np.uint8]:
    """The pixels of a crop, resized to a square: bilinear, without antialiasing.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its resolution where the crop still has `size` pixels
    each way then, which takes a fraction of the time and averages the pixels as it goes. The
    crop's edges are rounded to pixels of that resolution.

    Args:
      encoded: the image.
      crop: top, left, height and width in pixels of the full resolution, inside the image.
      size: height and width of the result.
      flip: whether to mirror the result, left to right.
      out: contiguous uint8, (size, size, 3), where to put the result; None makes a new array.

    Returns:
      uint8, (size, size, 3), in RGB.

    Raises:
      CorruptImageError: as for `decode`.
      ValueError: the crop is not inside the image.
    """
    top, left, height, width = (int(number) for number in crop)
    scale = next((s for s in (8, 4, 2) if min(height, width) >= s * size), 1)
    pixels = _decode_reduced(encoded, scale)
    inside = top + height <= pixels.shape[0] * scale and left + width <= pixels.shape[1] * scale
    if min(top, left) < 0 or min(height, width) < 1 or not inside:
        raise ValueError(f"crop={(top, left, height, width)} does not lie inside the image")
    rows, columns = _divide(height, scale), _divide(width, scale)
    first_row = min(_divide(top, scale), pixels.shape[0] - rows)
    first_column = min(_divide(left, scale), pixels.shape[1] - columns)
    cut = pixels[first_row : first_row + rows, first_column : first_column + columns]
    if out is None:
        out = np.empty((size, size, 3), np.uint8)
    if flip:
        resized = cv2.resize(cut, (size, size), interpolation=cv2.INTER_LINEAR)
        cv2.flip(resized, 1, dst=out)
    else:
        cv2.resize(cut, (size, size), dst=out, interpolation=cv2.INTER_LINEAR)
    return out


def random_crops(
    seed: int, first: int, heights: npt.ArrayLike, widths: npt.ArrayLike
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Crops, random in place and size, and flips for images at consecutive positions of a run.

    The area is uniform in [0.08, 1] of the image's and the ratio of the sides log-uniform in
    [3/4, 4/3]; where ten attempts do not fit into the image, the crop is the largest centred one
    within those ratios. Source: C. Szegedy et al., Going Deeper with Convolutions, CVPR 2015,
    with torchvision's number of attempts.

    Args:
      seed: seed of the run.
      first: position of the first image in the run's stream. The draws for an image are given by
        the seed and its position alone, however the stream is cut into pieces.
      heights: heights of the n images in pixels.
      widths: their widths.

    Returns:
      Crops, int32, (n, 4), of top, left, height and width; and whether to flip, bool, (n,).
    """
    height = np.asarray(heights, np.int64)
    width = np.asarray(widths, np.int64)
    generator = np.random.Philox(key=seed, counter=first * _BLOCKS)
    raw = generator.random_raw(len(height) * _BLOCKS * 4).reshape(len(height), _BLOCKS * 4)
    uniform = (raw >> np.uint64(11)) * 2.0**-53
    draws = uniform[:, : 4 * _ATTEMPTS].reshape(-1, _ATTEMPTS, 4)
    area = (height * width)[:, None] * (MIN_AREA + (1 - MIN_AREA) * draws[..., 0])
    ratio = MAX_RATIO ** (2 * draws[..., 1] - 1)
    crop_widths = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    crop_heights = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (
        (crop_widths >= 1)
        & (crop_heights >= 1)
        & (crop_widths <= width[:, None])
        & (crop_heights <= height[:, None])
    )
    row, attempt = np.arange(len(height)), fits.argmax(axis=1)
    crop_width, crop_height = crop_widths[row, attempt], crop_heights[row, attempt]
    top = np.floor(draws[row, attempt, 2] * (height - crop_height + 1)).astype(np.int64)
    left = np.floor(draws[row, attempt, 3] * (width - crop_width + 1)).astype(np.int64)

    centred_width = np.minimum(width, np.rint(height * MAX_RATIO).astype(np.int64))
    centred_height = np.minimum(height, np.rint(width * MAX_RATIO).astype(np.int64))
    centred = (height - centred_height) // 2, (width - centred_width) // 2
    crops = np.where(
        fits.any(axis=1),
        [top, left, crop_height, crop_width],
        [*centred, centred_height, centred_width],
    )
    return crops.T.astype(np.int32), uniform[:, 4 * _ATTEMPTS] < 0.5


def central_crop(height: int, width: int, ratio: float = 0.875) -> tuple[int, int, int, int]:
    """Top, left, height, width of the centred square of `ratio` of the image's shorter side.

    With 0.875 and 224 pixels this is, in one step, the usual evaluation on ImageNet, which
    resizes the shorter side to 256 pixels and cuts out 224.
    """
    side = max(1, round(ratio * min(height, width)))
    return (height - side) // 2, (width - side) // 2, side, side


def _divide(number: int, divisor: int) -> int:
    """The quotient rounded to the nearest integer, halves up."""
    return (number + divisor // 2) // divisor


def _checked(size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    if height * width > MAX_PIXELS:
        raise CorruptImageError(
            f"{width}x{height} pixels are more than {MAX_PIXELS}, the most that is decoded"
        )
    return size


def _jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that libjpeg-turbo turns into RGB; None leaves it to Pillow."""
    if not encoded.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(encoded, strict=False)
    except (KeyError, ValueError):  # rare kinds of subsampling, or no usable header
        return None
    return None if colorspace in ("CMYK", "YCCK") else (height, width)


def _decode_reduced(encoded: bytes, scale: int) -> npt.NDArray[np.uint8]:
    """RGB pixels at 1/scale of the resolution; height and width are rounded up."""
    size = _jpeg_size(encoded)
    if size is not None:
        height, width = _checked(size)
        limits = (-(-height // scale), -(-width // scale), scale) if scale > 1 else (0, 0, 1)
        try:
            return simplejpeg.decode_jpeg(
                encoded,
                "RGB",
                min_height=limits[0],
                min_width=limits[1],
                min_factor=limits[2],
                strict=True,
            )
        except ValueError as error:
            # Pillow decodes on after any warning, but not where the data ends too early.
            if not any(warning in str(error) for warning in _HARMLESS):
                raise CorruptImageError(f"damaged JPEG: {error}") from None
    with _opened(encoded) as image:
        _checked((image.height, image.width))
        image = _to_rgb(image)
        if np.asarray(image).max() <= 1:
            _refuse_if_made_black(encoded)
        # The counterpart of a JPEG's scaled decoding, averaging blocks of pixels.
        return np.array(image.reduce(scale) if scale > 1 else image)


@contextlib.contextmanager
def _opened(encoded: bytes) -> Iterator[Image.Image]:
    """The image, opened by Pillow; whatever goes wrong in the block is a CorruptImageError."""
    if not encoded:
        raise CorruptImageError("it is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(encoded), formats=tuple(FORMATS)) as image:
            yield image
    except (CorruptImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise CorruptImageError(
            f"not an image in one of the formats {', '.join(FORMATS)}, or its pixels are of a kind"
            " that is not read"
        ) from None
    except Exception as error:  # Pillow raises nearly every type of exception on damaged data
        raise CorruptImageError(f"damaged image: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB with 8 bits; transparency is ignored."""
    image.load()
    # Pillow would warn where it cannot carry the transparent colour over.
    image.info.pop("transparency", None)
    if image.mode == "F" or image.mode.startswith("I") or _is_signed(image):
        return Image.fromarray(np.stack([_eight_bits(image)] * 3, axis=-1))
    if image.mode == "La":
        image = image.convert("LA")  # from which alone Pillow goes on
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        # Pillow takes every CMYK JPEG to be inverted, as Adobe stores them.
        image = ImageChops.invert(image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> npt.NDArray[np.uint8]:
    """The values of a grey image, as the module's docstring says; raises CorruptImageError."""
    values = np.asarray(image)
    if values.dtype == np.uint8:  # so Pillow reads signed ones too
        values = values.view(np.int8)
    if values.dtype.kind == "u" or (image.format != "TIFF" and image.mode == "I"):
        # Pillow scales what has fewer bits to 16, but for TIFF.
        values = values >> (_tag(image, TiffImagePlugin.BITSPERSAMPLE, 16) - 8)
    low, high = values.min(), values.max()
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        values = np.rint(255 * values)
    elif not (low >= 0 and high <= 255 and np.array_equal(values, np.rint(values))):
        kind, right = "32-bit or signed integers", "0 to 255"
        if values.dtype.kind == "f":
            kind, right = "floating-point numbers", "0 to 1, or whole numbers from 0 to 255"
        raise CorruptImageError(
            f"its pixels are {kind} from {low:g} to {high:g}, of which nothing says what is white;"
            f" they must be {right}, or have 8 or 16 bits"
        )
    grey = values.astype(np.uint8)
    white_is_zero = _tag(image, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 1) == 0
    return 255 - grey if white_is_zero else grey


def _refuse_if_made_black(encoded: bytes) -> None:
    """Raises CorruptImageError where an image is black for want of the lower 8 of its 16 bits."""
    values = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR)
    if values is not None and values.dtype == np.uint16 and 0 < values.max() <= 255:
        raise CorruptImageError(
            f"its pixels have 16 bits, but are at most {values.max()} of 65535, which is black;"
            " they must use the whole range, or have 8 bits"
        )


def _is_signed(image: Image.Image) -> bool:
    return _tag(image, TiffImagePlugin.SAMPLEFORMAT, 1) == 2


def _tag(image: Image.Image, number: int, default: int) -> int:
    """A number that a TIFF says of its pixels, of the first channel's; `default` if it does not."""
    value = getattr(image, "tag_v2", {}).get(number, default)
    return int(value[0] if isinstance(value, tuple) else value)
