"""Which images a data set is of, by their names and sizes: an image's number means the same image in every rank, in a
run that goes on and in what reads it later. Files are looked at (one stat call each), never read."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ifnd_fast.runtime import checkpoint, distributed
from ifnd_fast.runtime.console import warn
from ifnd_fast.runtime.errors import PeerError, UsageError
from ifnd_fast.runtime.paths import shown

EXAMPLES = 3


class Listing(NamedTuple):
    """A part of a data set, in order."""

    names: list[str]
    """of N images, relative to the part's folder, so that it may lie anywhere; none of images in memory"""
    sizes: np.ndarray
    """(N,) int64, bytes; -1: not there"""
    content: str = ""
    """a digest of what else an image's number depends on: the arrays in memory, an annotation file"""


Parts = Mapping[str, Listing]
"""By what a part is called: "train", "test"."""
Identity = dict[str, str]
"""For each part the digest of its listing."""


def identity_of(parts: Parts) -> Identity:
    return {name: _digest(listing) for name, listing in parts.items()}


def _digest(listing: Listing) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update("\0".join(listing.names).encode(errors="surrogatepass"))
    digest.update(np.ascontiguousarray(listing.sizes, dtype="<i8").tobytes())
    digest.update(listing.content.encode())
    return digest.hexdigest()


def content_of(*arrays: np.ndarray) -> str:
    """A digest of arrays, for `Listing.content`."""
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def difference(then: Listing, now: Listing) -> str:
    """What differs, in a clause with numbers and the first names; empty: nothing does."""
    sizes = dict(zip(then.names, then.sizes.tolist(), strict=True)) if then.names else {}
    sizes_now = dict(zip(now.names, now.sizes.tolist(), strict=True)) if now.names else {}
    clauses = []
    for what, names in (
        ("missing", [name for name in then.names if name not in sizes_now]),
        ("new", [name for name in now.names if name not in sizes]),
        ("of another size", [name for name, size in sizes.items() if sizes_now.get(name, size) != size]),
    ):
        if names:
            clauses.append(f"{len(names):,} {what} ({_examples(names)})")
    if not clauses and then.names != now.names:
        repeated = (Counter(now.names) - Counter(then.names)) + (Counter(then.names) - Counter(now.names))
        clauses.append("named another number of times: " + _examples(repeated) if repeated else "in another order")
    if not clauses and len(then.sizes) != len(now.sizes):
        clauses.append(f"{len(then.sizes):,} then, {len(now.sizes):,} now")
    if then.content != now.content and not clauses:
        clauses.append("of other content")
    return ", ".join(clauses)


def _examples(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(shown, names[:EXAMPLES])) + (", ..." if len(names) > EXAMPLES else "")


# ---- among ranks ----


def agree(parts: Parts, what: str) -> Identity:
    """The identity, which all ranks have; all have to call it. `what` is what to call the data, such as "--data X".

    Raises:
        UsageError: they don't, with the number of images and the names that differ; PeerError on ranks but 0.
    """
    own = identity_of(parts)
    if distributed.world_size() == 1:
        return own
    gathered = distributed.all_gather_objects(own)
    if all(other == own for other in gathered):
        return own
    # only now, for of a million images they take a while
    first = distributed.all_gather_objects(dict(parts) if distributed.rank() == 0 else None)[0]
    assert first is not None
    counts = ", ".join(f"{len(listing.sizes):,} {name} images" for name, listing in first.items())
    differing = distributed.all_gather_objects("; ".join(_differences(first, parts)))
    lines = [f"\n  rank {number}, compared with rank 0: {text}" for number, text in enumerate(differing) if text]
    message = f"{what}: the ranks find different images (rank 0: {counts}):" + "".join(lines)
    raise UsageError(message) if distributed.rank() == 0 else PeerError(message, UsageError.exit_code)


def _differences(then: Parts, now: Parts, names: Iterable[str] | None = None) -> list[str]:
    lines = []
    for name in dict.fromkeys([*then, *now]) if names is None else names:
        if name not in now or name not in then:
            lines.append(f"there are {'no' if name not in now else 'now'} {name} images")
        elif text := difference(then[name], now[name]):
            lines.append(f"{name} images: {text}")
    return lines


# ---- beside checkpoints ----


def _path(out: Path, identity: Identity) -> Path:
    """OUT/checkpoints/images-DIGEST.json.gz: which images the checkpoints' numbers mean."""
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=6).hexdigest()
    return checkpoint.folder(out) / f"images-{digest}.json.gz"


def keep(out: Path, parts: Parts) -> Identity:
    """Write the listing beside the checkpoints in OUT, where it is not there yet; its identity.

    Raises:
        CommandError: the disk is full or not writable.
    """
    identity = identity_of(parts)
    path = _path(out, identity)
    if not path.exists():
        content = {name: [part.names, part.sizes.tolist(), part.content] for name, part in parts.items()}
        packed = gzip.compress(json.dumps(content).encode(), compresslevel=6, mtime=0)
        checkpoint.write_atomically(path, lambda file: file.write(packed))
        for other in checkpoint.folder(out).glob("images-*.json.gz"):
            if other != path:
                other.unlink(missing_ok=True)
    return identity


def kept(out: Path, identity: Identity) -> dict[str, Listing] | None:
    """The listing of that identity in OUT; None: it is lost or damaged."""
    try:
        content: dict[str, Any] = json.loads(gzip.decompress(_path(out, identity).read_bytes()))
        return {name: Listing(part[0], np.array(part[1], dtype=np.int64), part[2]) for name, part in content.items()}
    except (OSError, EOFError, ValueError, TypeError, KeyError, IndexError, zlib.error):
        return None


def changes(out: Path, then: Identity, parts: Parts) -> str:
    """How the parts differ from those of the identity `then`, whose listing is in OUT; empty: they don't.

    Of parts that only one side has, those count that are in `parts`: a reader may have use for some alone.
    """
    differing = [name for name, digest in identity_of(parts).items() if then.get(name) != digest]
    if not differing:
        return ""
    listing = kept(out, then)
    if listing is None:
        return f"the {' and '.join(differing)} images are others (in what is not known: the listing in {out} is lost)"
    return "; ".join(_differences(listing, parts, differing)) or "they are of other content"


def check(out: Path, then: Identity | None, parts: Parts, what: str) -> None:
    """Before a training in OUT, whose identity was `then`, goes on with the data `what`, such as "--data X".

    Raises:
        UsageError: the data differ, with the number and the first names.
    """
    if not then:
        warn(f"{out} was written by an earlier version: it can't be checked that its images are those of {what}")
        return
    text = changes(out, then, parts)
    lost = [name for name in then if name not in parts]
    if not text and lost:
        text = f"there are no {' and '.join(lost)} images"
    if text:
        raise UsageError(
            f"--resume: {what} does not hold the images that {out} was started with: {text}. An image's number would "
            "mean another image: give the data as they were, or start anew in another --out"
        )
