"""A table of embedded images as a file: .npz of NumPy, or .parquet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ifnd_fast.runtime.checkpoint import write_atomically
from ifnd_fast.runtime.errors import UsageError

KINDS = (".npz", ".parquet")


@dataclass
class Embedded:
    """N images that could be read, at L levels of clusters."""

    names: list[str]
    """of the files, relative to the folder of their part; "image 5" of images in memory"""
    parts: list[str]
    """"train" or "test" """
    vectors: np.ndarray
    """(N, D) float32, as the network gives them"""
    labels: np.ndarray | None
    """(N,) int64, of true classes; None: there are none"""
    class_names: list[str]
    """of the labels; empty: they have none"""
    levels: tuple[int, ...]
    """clusters at each level"""
    clusters: np.ndarray
    """(N, L) int32, -1 for vectors that are zero or not finite"""
    confidence: np.ndarray
    """(N, L) float32, above 0 and up to 1; 0 where there is no cluster"""


def check_kind(path: Path) -> None:
    """Before long work that would be lost.

    Raises:
        UsageError: the name has another ending, or pyarrow is not installed.
    """
    if path.suffix not in KINDS:
        raise UsageError(f"--out {path}: give a name that ends in {' or '.join(KINDS)}")
    if path.suffix == ".parquet":
        _pyarrow()


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        message = f"--out with .parquet: pip install 'ifnd-fast[parquet]' first, or give .npz ({error})"
        raise UsageError(message) from error
    return pyarrow


def write(path: Path, found: Embedded) -> None:
    """The file, of the kind that its name ends in; the same bytes for the same images.

    .npz holds the arrays `names`, `parts`, `vectors`, `labels` (-1 everywhere without classes), `class_names`,
    `levels`, `clusters`, `confidence`. .parquet has a row for each image, with the columns `name`, `part`, `vector`,
    `label` and `class` where there are any, and for each level of C clusters `cluster_C` and `confidence_C`.

    Raises:
        CommandError: the disk is full or not writable.
    """
    write_atomically(path, lambda file: (_npz if path.suffix == ".npz" else _parquet)(file, found))


def _npz(file: Any, found: Embedded) -> None:
    labels = np.full(len(found.names), -1, dtype=np.int64) if found.labels is None else found.labels
    np.savez(
        file, names=np.array(found.names), parts=np.array(found.parts), vectors=found.vectors, labels=labels,
        class_names=np.array(found.class_names, dtype=np.str_), levels=np.array(found.levels, dtype=np.int64),
        clusters=found.clusters, confidence=found.confidence,
    )  # fmt: skip


def _parquet(file: Any, found: Embedded) -> None:
    arrow = _pyarrow()
    flat = arrow.array(found.vectors.reshape(-1))
    columns = {
        "name": arrow.array(found.names, arrow.string()),
        "part": arrow.array(found.parts, arrow.string()),
        "vector": arrow.FixedSizeListArray.from_arrays(flat, found.vectors.shape[1]),
    }
    if found.labels is not None:
        columns["label"] = arrow.array(found.labels)
        if found.class_names:
            columns["class"] = arrow.array([found.class_names[label] for label in found.labels], arrow.string())
    for level, n_clusters in enumerate(found.levels):
        columns[f"cluster_{n_clusters}"] = arrow.array(found.clusters[:, level])
        columns[f"confidence_{n_clusters}"] = arrow.array(found.confidence[:, level])
    arrow.parquet.write_table(arrow.table(columns), file, row_group_size=65_536)
