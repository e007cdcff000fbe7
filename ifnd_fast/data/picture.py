"""One picture from a file: in any of the usual formats, turned upright, in RGB with 8 bits a channel.

What becomes of what a file can hold:

- More than 8 bits. Unsigned 16-bit values are divided by 257 (so 65,535 is 255); of fewer bits in 16 (TIFF says how
  many) the highest one is 255. RGB of 16 bits keeps its high bytes, as Pillow reads it. Other integers stay as they are
  if all lie in 0..255, floats also, and those in 0..1 are multiplied by 255; else the picture's own lowest value is 0
  and its highest 255, and one of a single value is black. Among floats NaN and -inf are black, inf is white, and none
  of them counts for the range.
- Transparency: the picture lies on white.
- Orientation (EXIF or XMP): applied; broken metadata are none.
- Several frames or pages: the first one.
- CMYK, YCbCr, HSV, palettes: Pillow's conversion; CMYK in JPEG files is inverted, as Adobe writes it. LAB: by
  littlecms, D50, to sRGB. ICC profiles are ignored.
- More pixels than PIL.Image.MAX_IMAGE_PIXELS, truncated data, no pixels, no regular file: unreadable.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from ifnd_fast.runtime.errors import CommandError

FORMATS = (
    "JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "HEIF", "JPEG2000", "JXL", "MPO", "DIB", "PCX", "PSD",
    "QOI", "SGI", "SUN", "TGA",
)  # fmt: skip
"""Of photographs, drawings and scans. Pillow has others: icons, cursors, game textures, pages that a program has to be
started for (EPS), containers that it only names (HDF5, GRIB, MPEG, WMF). HEIF and JXL need a plugin of their own."""
GROUND = "white"
TAG_BITS, TAG_PHOTOMETRIC, TAG_SAMPLE_FORMAT = 258, 262, 339
WHITE_IS_ZERO, UNSIGNED = 0, 1
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What turns a picture upright, by its orientation."""


class UnreadablePictureError(OSError):
    """A picture that can't be read, decoded or converted.

    Attributes:
        reason: why, without the file's name.
    """

    def __init__(self, name: object, reason: str):
        super().__init__(f"{name}: {reason}")
        self.reason = reason


def reason_of(error: Exception) -> str:
    """Why a picture can't be used, without the name of its file."""
    if isinstance(error, UnreadablePictureError):
        return error.reason
    if isinstance(error, UnidentifiedImageError):
        return "no picture in a format that can be read here"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    kind = "" if type(error) is OSError else type(error).__name__
    return ": ".join(part for part in (kind, " ".join(str(error).split())) if part) or "OSError"


@cache
def formats() -> tuple[str, ...]:
    """Those of FORMATS that Pillow can open here."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def extensions() -> frozenset[str]:
    """Endings of names (".jpg", ...), lower case, of the formats that can be opened here."""
    opened = {*formats(), *(("MPO",) if "JPEG" in formats() else ())}  # JPEG's reader opens MPO
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in opened)


def open_picture(path: Path | str, upright: bool = True) -> Image.Image:
    """The picture in mode RGB, as this module's docstring says; not `upright`: as it is stored.

    Raises:
        UnreadablePictureError: whatever is wrong with it.
    """
    return _decoded(lambda: open(_regular(path), "rb"), path, upright)


def decode_picture(content: bytes, name: str) -> Image.Image:
    """As `open_picture`, of a file's content; `name` is what to call it."""

    def opened() -> IO[bytes]:
        if not content:
            raise OSError("the file is empty")
        return io.BytesIO(content)

    return _decoded(opened, name, upright=True)


def _decoded(opened: Callable[[], IO[bytes]], name: Path | str, upright: bool) -> Image.Image:
    try:
        with warnings.catch_warnings(), opened() as file:  # of odd metadata there may be thousands
            warnings.simplefilter("ignore")
            with _opened(file) as image:
                _refuse_size(image.size)
                image.load()
                turn = _turn(image) if upright else None
                picture = to_rgb(image)
                return picture if turn is None else picture.transpose(turn)
    except CommandError:  # a signal that asks the command to stop
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
        raise UnreadablePictureError(name, reason_of(error)) from error


def _opened(file: IO[bytes]) -> Image.Image:
    try:
        return Image.open(file, formats=formats())
    except UnidentifiedImageError:
        for name in formats():
            factory, accept = Image.OPEN[name]
            file.seek(0)
            if accept is not None and accept(file.read(16)) is True:
                file.seek(0)
                try:
                    factory(file, "")
                except (SyntaxError, IndexError, TypeError, struct.error) as error:  # those that Pillow keeps to itself
                    raise OSError(f"{name}: {reason_of(error)}") from error
        raise


def _regular(path: Path | str) -> Path | str:
    """The path; a pipe, say, would make its reader wait for good."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("a folder, not a file" if stat.S_ISDIR(status.st_mode) else "no regular file")
    if status.st_size == 0:
        raise OSError("the file is empty")
    return path


def _refuse_size(size: tuple[int, int]) -> None:
    width, height = size
    limit = Image.MAX_IMAGE_PIXELS
    if width < 1 or height < 1:
        raise OSError(f"{width} x {height} pixels")
    if limit is not None and width * height > limit:
        raise OSError(f"{width} x {height} pixels, more than {limit:,} (PIL.Image.MAX_IMAGE_PIXELS)")


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except CommandError:
        raise
    except Exception:  # broken metadata
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode in mode RGB, of the same size.

    Raises:
        ValueError: there is no such conversion, or none of its values is a number.
    """
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _grey(image)
    elif image.mode == "LAB":
        return _from_lab(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    premultiplied = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)
    if premultiplied is not None:
        image = image.convert(premultiplied)
    image = image.convert("RGBA")
    ground = Image.new("RGB", image.size, GROUND)
    ground.paste(image, mask=image.getchannel("A"))
    return ground


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None
    return converted


def _grey(image: Image.Image) -> Image.Image:
    """8 bits of an image of wider integers or floats; white where it is transparent."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "I" and _first(tags, TAG_BITS) == 32 and _first(tags, TAG_SAMPLE_FORMAT, UNSIGNED) == UNSIGNED:
        values = values.view(np.uint32)  # Pillow has no mode for them
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        bits = _first(tags, TAG_BITS, 16)
        grey = scaled(values, 0, (1 << bits) - 1 if 8 < bits < 16 else 65_535)
        if _first(tags, TAG_PHOTOMETRIC) == WHITE_IS_ZERO:
            grey = 255 - grey
    else:
        grey = scaled(values, *_own_range(values))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey = np.where(values == transparent, 255, grey).astype(np.uint8)
    return Image.fromarray(grey)


def _first(tags: dict[int, int | tuple[int, ...]], tag: int, default: int = -1) -> int:
    value = tags.get(tag, default)
    return value[0] if isinstance(value, tuple) else value


def _own_range(values: np.ndarray) -> tuple[float, float]:
    """What is to be black and what white."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("none of its values is a finite number")
    low, high = float(finite.min()), float(finite.max())
    if low >= 0 and high <= 1 and values.dtype.kind == "f":
        return 0.0, 1.0
    return (0.0, 255.0) if low >= 0 and high <= 255 else (low, high)


def scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8 of the same shape: 0 for `low` and less and NaN, 255 for `high` and more, rounded in between; all 0 where
    `high` is `low`."""
    if high <= low:
        return np.zeros(values.shape, dtype=np.uint8)
    parts = np.clip((values.astype(np.float64) - low) / (high - low), 0, 1)
    return (255 * np.nan_to_num(parts, nan=0.0) + 0.5).astype(np.uint8)
