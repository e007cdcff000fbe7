"""Pictures of all the kinds that there are, made here, with the right pixels; and files that are none."""

from __future__ import annotations

import ctypes
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence, TiffImagePlugin

from ifnd_fast.data.images import image_extensions
from ifnd_fast.data.picture import UnreadablePictureError, open_picture, scaled

RAMP = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20  # 0, 20, ..., 220
COLOURS = np.stack([RAMP, RAMP[::-1], np.full_like(RAMP, 77)], axis=2)


def pixels(path: Path) -> np.ndarray:
    image = open_picture(path)
    assert image.mode == "RGB" and type(image) is Image.Image
    return np.asarray(image)


def same(path: Path, expected: np.ndarray, tolerance: int = 0) -> None:
    """Grey (H, W) or RGB (H, W, 3)."""
    expected = expected if expected.ndim == 3 else np.repeat(expected[:, :, None], 3, axis=2)
    found = pixels(path)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= tolerance, found[..., 0]


def png(path: Path, size: tuple[int, int], bits: int, colour: int, rows: list[bytes], **chunks: bytes) -> Path:
    """A PNG file, of chunks: Pillow writes no 16-bit RGB, and none that is broken."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    body = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0))
    body += b"".join(chunk(kind.encode(), data) for kind, data in chunks.items())
    body += chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def tiff(path: Path, values: np.ndarray, photometric: int = 1, order: str = "<") -> Path:
    """An uncompressed TIFF file of (H, W) numbers of any type."""
    values = values.astype(values.dtype.newbyteorder(order))
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    height, width = values.shape
    tags = [(256, width), (257, height), (258, 8 * values.itemsize), (259, 1), (262, photometric), (273, 8),
            (277, 1), (278, height), (279, values.nbytes), (339, kind)]  # fmt: skip
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    start = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8 + values.nbytes)
    path.write_bytes(start + values.tobytes() + struct.pack(f"{order}H", len(tags)) + entries + bytes(4))
    return path


# ---- more than 8 bits ----

WIDE = np.array([[0, 128, 129, 257], [25700, 32767, 65534, 65535]], dtype=np.uint16)
NARROWED = np.array([[0, 0, 1, 1], [100, 127, 255, 255]], dtype=np.uint8)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big-endian.tif", "white-is-zero.tif", "a.pgm", "a.jp2"])
def test_unsigned_16_bit_is_divided_by_257(name, tmp_path):
    path, expected = tmp_path / name, NARROWED
    if name == "a.pgm":
        path.write_bytes(b"P5 4 2 65535\n" + WIDE.astype(">u2").tobytes())
    elif name == "big-endian.tif":
        tiff(path, WIDE, order=">")
    elif name == "white-is-zero.tif":
        tiff(path, WIDE, photometric=0)
        expected = 255 - NARROWED
    else:
        Image.fromarray(WIDE).save(path)
    same(path, expected)


def test_fewer_bits_in_16_reach_white(tmp_path):
    """12 bits by a TIFF's tag, 10 by a PGM's highest value."""
    values = np.array([[0, 2048, 4095, 4095]], dtype=np.uint16)
    packed = bytes([0x00, 0x08, 0x00, 0xFF, 0xFF, 0xFF])
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 6)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    (tmp_path / "a.tif").write_bytes(
        b"II" + struct.pack("<HI", 42, 14) + packed + struct.pack("<H", len(tags)) + entries + bytes(4)
    )
    same(tmp_path / "a.tif", np.array([[0, 128, 255, 255]]))
    (tmp_path / "a.pgm").write_bytes(b"P5 4 1 1023\n" + (values // 4).astype(">u2").tobytes())
    same(tmp_path / "a.pgm", np.array([[0, 128, 255, 255]]))


def test_16_bit_rgb_keeps_its_high_bytes(tmp_path):
    rows = [struct.pack(">6H", 0, 0x1234, 0xFFFF, 0x80FF, 0xFE00, 0x0100)]
    path = png(tmp_path / "a.png", (2, 1), 16, 2, rows)
    same(path, np.array([[[0, 0x12, 0xFF], [0x80, 0xFE, 1]]]))


@pytest.mark.parametrize(
    "values, expected",
    [
        (np.array([[-1000, 0, 1000]], np.int16), [0, 128, 255]),
        (np.array([[-5, 0, 250]], np.int32), [0, 5, 255]),
        (np.array([[0, 7, 255]], np.int32), [0, 7, 255]),
        (np.array([[0, 1, 1]], np.uint32), [0, 1, 1]),
        (np.array([[0, 70_000, 140_000]], np.uint32), [0, 128, 255]),
        (np.array([[0, 1 << 31, (1 << 32) - 1]], np.uint32), [0, 128, 255]),
        (np.array([[-(1 << 31), 0, (1 << 31) - 1]], np.int32), [0, 128, 255]),
        (np.array([[300, 300, 300]], np.int32), [0, 0, 0]),
        (np.array([[100, 100, 100]], np.int32), [100, 100, 100]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.25, 0.25, 0.25]], np.float32), [64, 64, 64]),
        (np.array([[0.0, 1.5, 254.6]], np.float32), [0, 2, 255]),
        (np.array([[-1.0, 0.0, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[1e6, 2e6, 3e6]], np.float32), [0, 128, 255]),
        (np.array([[-3e38, 0, 3e38]], np.float32), [0, 128, 255]),
        (np.array([[-7.0, -7.0, -7.0]], np.float32), [0, 0, 0]),
        (np.array([[np.nan, 0.5, np.inf]], np.float32), [0, 128, 255]),
        (np.array([[-np.inf, 100, 300, 200, np.nan]], np.float32), [0, 0, 255, 128, 0]),
    ],
    ids=str,
)  # fmt: skip
def test_other_numbers_by_their_own_range(values, expected, tmp_path):
    for order in "<" if values.dtype == np.uint32 else "<>":  # those Pillow reads in Intel's order alone
        same(tiff(tmp_path / "a.tif", values, order=order), np.array([expected]))


def test_portable_floats(tmp_path):
    """PFM stores its rows from the bottom up."""
    values = np.array([[0.0, 1.0], [-1.0, 3.0]], np.float32)
    (tmp_path / "a.pfm").write_bytes(b"Pf\n2 2\n-1.0\n" + values[::-1].tobytes())
    same(tmp_path / "a.pfm", np.array([[64, 128], [0, 255]]))


def test_no_numbers_at_all_are_no_picture(tmp_path):
    with pytest.raises(UnreadablePictureError, match="none of its values is a finite number"):
        open_picture(tiff(tmp_path / "a.tif", np.full((2, 2), np.nan, np.float32)))


def test_scaled_rounds_and_clips():
    values = np.array([-1, 0, 1, 2, 3, 4, 9], np.float32)
    assert scaled(values, 0, 4).tolist() == [0, 0, 64, 128, 191, 255, 255]


# ---- transparency ----


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "a.tga", "a.avif"])
def test_transparent_pictures_lie_on_white(name, tmp_path):
    if f".{name[2:]}" not in image_extensions():
        pytest.skip("this Pillow can't open them")
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[:, :8] = (200, 0, 100, 0)  # what is behind transparency doesn't show
    rgba[8:, 8:] = (0, 0, 0, 255)
    rgba[:8, 8:] = (0, 100, 0, 128)
    options = {"lossless": True} if name == "a.webp" else {"quality": 100} if name == "a.avif" else {}
    Image.fromarray(rgba).save(tmp_path / name, **options)
    found = pixels(tmp_path / name)[4::8, 4::8].astype(int)
    expected = np.array([[[255, 255, 255], [127, 177, 127]], [[255, 255, 255], [0, 0, 0]]])
    assert np.abs(found - expected).max() <= (6 if name == "a.avif" else 0), found


def test_palettes_and_keys_of_transparency(tmp_path):
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([9, 9, 9, 50, 60, 70, 0, 0, 0])
    for name, options in (("one.png", {"transparency": 0}), ("one.gif", {"transparency": 0}),
                          ("each.png", {"transparency": bytes([0, 255, 255])})):  # fmt: skip
        palette.save(tmp_path / name, **options)
        same(tmp_path / name, np.array([[[255] * 3, [50, 60, 70], [0, 0, 0]]]))
    palette.save(tmp_path / "none.png")
    same(tmp_path / "none.png", np.array([[[9] * 3, [50, 60, 70], [0, 0, 0]]]))
    Image.fromarray(RAMP).save(tmp_path / "grey.png", transparency=20)
    same(tmp_path / "grey.png", np.where(RAMP == 20, 255, RAMP))
    Image.fromarray(COLOURS).save(tmp_path / "rgb.png", transparency=tuple(COLOURS[0, 1].tolist()))
    same(tmp_path / "rgb.png", np.where((COLOURS == COLOURS[0, 1]).all(2, keepdims=True), 255, COLOURS))
    path = png(tmp_path / "16.png", (2, 1), 16, 0, [struct.pack(">2H", 257, 514)], tRNS=struct.pack(">H", 257))
    same(path, np.array([[255, 2]]))
    Image.fromarray(np.stack([RAMP, np.full_like(RAMP, 255)], 2), "LA").save(tmp_path / "la.png")
    same(tmp_path / "la.png", RAMP)
    path = png(tmp_path / "la16.png", (2, 1), 16, 4, [struct.pack(">4H", 0x5000, 0xFFFF, 0, 0)])
    same(path, np.array([[0x50, 255]]))


# ---- colours ----


def test_cmyk_as_adobe_writes_it_and_as_tiff_does(tmp_path):
    cmyk = np.zeros((16, 16, 4), np.uint8)
    cmyk[:, :8], cmyk[:, 8:] = (255, 0, 0, 0), (0, 255, 255, 51)  # cyan; dark red
    for name in ("a.jpg", "a.tif"):
        Image.fromarray(cmyk, "CMYK").save(tmp_path / name, **({"quality": 100} if name == "a.jpg" else {}))
        found = pixels(tmp_path / name)[8, [3, 12]].astype(int)
        assert np.abs(found - [[0, 255, 255], [204, 0, 0]]).max() <= 3, found


def test_lab_is_converted(tmp_path):
    """CIE's values of white, black, mid grey and sRGB's red (D50): 8 bits of L, signed bytes of a and b."""
    lab = np.array([[[255, 0, 0], [0, 0, 0], [137, 0, 0], [138, 81, 70]]], np.uint8)
    Image.frombytes("LAB", (4, 1), lab.tobytes()).save(tmp_path / "a.tif")
    same(tmp_path / "a.tif", np.array([[[255] * 3, [0] * 3, [128] * 3, [255, 0, 0]]]), tolerance=5)


def test_other_modes_and_ways_to_store(tmp_path):
    colours = Image.fromarray(np.kron(COLOURS, np.ones((8, 8, 1), np.uint8)))
    for name, options, tolerance in (
        ("progressive.jpg", {"progressive": True, "quality": 100, "subsampling": 0}, 3),
        ("a.jfif", {"quality": 100, "subsampling": 0, "format": "JPEG"}, 3),
        ("a.bmp", {}, 0), ("a.ppm", {}, 0), ("a.webp", {"lossless": True}, 0), ("a.tiff", {"compression": "lzma"}, 0),
        ("a.tga", {}, 0), ("a.pcx", {}, 0), ("a.sgi", {}, 0), ("a.jp2", {}, 0), ("deflate.tif", {"compression":
        "tiff_adobe_deflate"}, 0), ("really.png.jpg", {"format": "PNG"}, 0), ("no ending", {"format": "PNG"}, 0),
        ("profile.png", {"icc_profile": b"not a profile"}, 0),
    ):  # fmt: skip
        if name == "a.tiff":
            options = {"compression": "tiff_lzw"}
        colours.save(tmp_path / name, **options)
        same(tmp_path / name, np.asarray(colours), tolerance)
    bits = (RAMP > 100).astype(np.uint8) * 255
    for name in ("bits.png", "bits.pbm", "bits.tif"):
        Image.fromarray(bits).convert("1").save(tmp_path / name)
        same(tmp_path / name, bits)
    Image.fromarray(COLOURS).convert("YCbCr").save(tmp_path / "ycc.tif")
    same(tmp_path / "ycc.tif", COLOURS, 2)


def test_interlaced(tmp_path):
    """Adam7 of one pixel row by hand: passes of pixels 0, 4, 2 and 6, and the odd ones."""
    row = np.arange(8, dtype=np.uint8) * 30
    passes = [row[[0]], row[[4]], row[[2, 6]], row[1::2]]
    data = zlib.compress(b"".join(b"\0" + part.tobytes() for part in passes))
    path = png(tmp_path / "a.png", (8, 1), 8, 0, [])
    content = path.read_bytes()[:8]
    for kind, chunk in ((b"IHDR", struct.pack(">IIBBBBB", 8, 1, 8, 0, 0, 0, 1)), (b"IDAT", data), (b"IEND", b"")):
        content += struct.pack(">I", len(chunk)) + kind + chunk + struct.pack(">I", zlib.crc32(kind + chunk))
    path.write_bytes(content)
    same(path, row[None])


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_of_several_frames_the_first(name, tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    options = {"lossless": True} if name == "a.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    with Image.open(tmp_path / name) as image:
        assert len(list(ImageSequence.all_frames(image))) == 2
    same(tmp_path / name, np.broadcast_to(np.array([255, 0, 0]), (8, 8, 3)))


# ---- orientation ----


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp", "a.jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation, name, tmp_path):
    """An upright picture of which each quarter differs, stored as the orientation says (EXIF 2.32, 4.6.5.A)."""
    upright = np.kron(np.array([[0, 80, 160], [240, 40, 120]], np.uint8), np.ones((16, 16), np.uint8))
    stored = {  # what row 0 and column 0 of the stored picture are
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.T, 6: lambda a: np.rot90(a, 1), 7: lambda a: a[::-1, ::-1].T, 8: lambda a: np.rot90(a, -1),
    }[orientation](upright)  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if name == "a.webp" else {"quality": 100} if name == "a.jpg" else {}
    if name == "a.tif":
        options["tiffinfo"] = TiffImagePlugin.ImageFileDirectory_v2()
        options["tiffinfo"][0x0112] = orientation
    else:
        options["exif"] = exif
    Image.fromarray(np.ascontiguousarray(stored)).convert("RGB").save(tmp_path / name, **options)
    same(tmp_path / name, upright, 3 if name == "a.jpg" else 0)
    if name != "a.tif":
        assert open_picture(tmp_path / name, upright=False).size == stored.shape[::-1]


def test_broken_metadata_do_not_matter(tmp_path):
    unknown = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0"  # orientation 99
    for number, exif in enumerate((b"rubbish", b"II*\0\xff\xff\xff\xff", unknown)):
        exif = b"Exif\0\0" + exif
        Image.fromarray(COLOURS).save(tmp_path / f"{number}.png", exif=exif)
        same(tmp_path / f"{number}.png", COLOURS)


# ---- what is no picture ----


def test_reasons(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole, "JPEG")
    (tmp_path / "torn.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.jpg").write_text("<!DOCTYPE html><title>404</title>" * 20)
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nothing")
    (tmp_path / "vector.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    (tmp_path / "head.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    png(tmp_path / "nothing.png", (0, 5), 8, 0, [b""] * 5)
    png(tmp_path / "bits.png", (5, 1), 9, 0, [b"12345"])
    large = png(tmp_path / "large.png", (9500, 9500), 1, 0, [])
    bomb = png(tmp_path / "bomb.png", (60_000, 60_000), 1, 0, [])
    for path, reason in (
        ("torn.jpg", "truncated"), ("empty.jpg", "the file is empty"), ("page.jpg", "no picture in a format"),
        ("folder.jpg", "a folder, not a file"), ("pipe.jpg", "no regular file"), ("device.jpg", "no regular file"),
        ("loop.jpg", "symbolic links"), ("dangling.jpg", "No such file"), ("absent.jpg", "No such file"),
        ("vector.jpg", "no picture in a format"), ("head.png", "PNG"), ("nothing.png", "."), ("bits.png", "."),
        (large, "9500 x 9500 pixels, more than 89,478,485"), (bomb, "exceeds limit"),
    ):  # fmt: skip
        with pytest.raises(UnreadablePictureError, match=reason) as caught:
            open_picture(tmp_path / path)
        assert str(caught.value) == f"{tmp_path / path}: {caught.value.reason}"
        assert str(tmp_path) not in caught.value.reason and "\n" not in caught.value.reason


@pytest.mark.parametrize(
    "name, options",
    [
        ("a.jpg", {}), ("progressive.jpg", {"progressive": True}), ("a.png", {}), ("a.gif", {}), ("a.bmp", {}),
        ("a.tif", {}), ("lzw.tif", {"compression": "tiff_lzw"}), ("jpeg.tif", {"compression": "jpeg"}), ("a.webp", {}),
        ("lossless.webp", {"lossless": True}), ("a.ppm", {}), ("a.tga", {}), ("a.jp2", {}), ("a.pcx", {}),
        ("a.sgi", {}),
    ],
)  # fmt: skip
def test_files_that_were_cut_off_are_unreadable(name, options, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name, **options)
    content = (tmp_path / name).read_bytes()
    assert pixels(tmp_path / name).shape == (64, 64, 3)
    for share in (0.3, 0.6, 0.9, 0.99):
        (tmp_path / name).write_bytes(content[: int(share * len(content))])
        with pytest.raises(UnreadablePictureError):
            open_picture(tmp_path / name)


def test_no_warnings_of_odd_pictures(tmp_path, recwarn):
    png(tmp_path / "large.png", (9500, 9500), 1, 0, [])
    palette = Image.new("P", (4, 4))
    palette.save(tmp_path / "p.png", transparency=bytes([3, 4]))
    with pytest.raises(UnreadablePictureError):
        open_picture(tmp_path / "large.png")
    open_picture(tmp_path / "p.png")
    assert not recwarn.list


def test_narrow_pictures_and_bombs_take_little_memory(tmp_path):
    """Peak of a process that makes every view of pictures of 16,000 x 1, 1 x 16,000 and 60,000 x 60,000 pixels; and
    what it says of one that it may not read."""
    Image.fromarray(RAMP).save(tmp_path / "secret.png")
    (tmp_path / "secret.png").chmod(0)
    for name, size in (("wide.png", (16_000, 1)), ("high.png", (1, 16_000))):
        Image.new("L", size, 99).save(tmp_path / name)
    png(tmp_path / "bomb.png", (60_000, 60_000), 8, 0, [b"\0" * 60_000])
    code = (
        "import resource, sys\n"
        "from ifnd_fast.config import DataConfig\n"
        "from ifnd_fast.data.loading import CentreDataset, PairDataset\n"
        "from ifnd_fast.data.sources import open_images\n"
        "from ifnd_fast.report.thumbnails import thumbnail\n"
        "images, peaks = open_images(sys.argv[1]), []\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\n"
        "before = peak()\n"
        "for augment in ('loader', 'device'):\n"
        "    config = DataConfig(image_size=224, augment=augment, rotation=10.0)\n"
        "    for index in (0, 1, 3): PairDataset(images, config, 0)[0, index], CentreDataset(images, config)[index]\n"
        "for index in range(4): thumbnail(images, index, '')\n"
        "print(peak() - before, CentreDataset(images, config)[2][-1])"
    )

    def mere_owner():  # root reads anything, by these two capabilities: the new program does without
        for dac_override_and_read_search in (1, 2):
            ctypes.CDLL(None).prctl(24, dac_override_and_read_search)

    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, preexec_fn=mere_owner)
    grown, _, reason = done.stdout.partition(" ")
    assert reason == "Permission denied\n", done.stderr
    assert int(grown) < 200  # MiB; resized whole, one takes 4,000


def test_extensions_are_those_of_pictures():
    found = image_extensions()
    assert {".jpg", ".jpeg", ".jfif", ".png", ".gif", ".webp", ".tif", ".tiff", ".bmp", ".ppm", ".pgm"} <= found
    assert not found & {".pdf", ".eps", ".ps", ".h5", ".mpg", ".mpeg", ".ico", ".cur", ".wmf", ".fits", ".grib"}
    Image.init()
    assert (".avif" in found) == ("AVIF" in Image.OPEN)
