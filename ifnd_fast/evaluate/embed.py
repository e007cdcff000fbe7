"""ifnd-fast-embed: every image's features, its true class, and its cluster at each level, as one file."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from ifnd_fast.clustering.image_clusters import ImageClusters
from ifnd_fast.config import RANK_TIMEOUT, check_arguments, full_path
from ifnd_fast.data import identity
from ifnd_fast.data.found import listings, tell_found
from ifnd_fast.data.images import Images
from ifnd_fast.data.sources import open_for_run
from ifnd_fast.data.unreadable import Unreadable
from ifnd_fast.evaluate import embedding_file
from ifnd_fast.evaluate.cluster_images import LevelOptions, cluster_vectors
from ifnd_fast.evaluate.embedding_file import Embedded
from ifnd_fast.evaluate.feature_blocks import BATCH, BATCHES, FeatureBlocks
from ifnd_fast.evaluate.subject import Options, Subject
from ifnd_fast.runtime import distributed, run_folder
from ifnd_fast.runtime.compute import pick_device
from ifnd_fast.runtime.console import stage
from ifnd_fast.runtime.errors import CommandError, UsageError
from ifnd_fast.runtime.paths import refuse_folder, shown
from ifnd_fast.training.saved_run import load_encoder


def embed(
    common: tyro.conf.OmitArgPrefixes[Options],
    clustering: tyro.conf.OmitArgPrefixes[LevelOptions],
    out: Path,
    features: Literal["backbone", "encoder"] = "backbone",
    part: Literal["all", "train", "test"] = "all",
    rank_timeout: Annotated[float, RANK_TIMEOUT] = 30.0,
) -> None:
    """Write a file with every image's name, features, true class if it is known, and cluster and confidence at each
    level of a clustering of these features (their unit vectors); --levels without numbers leaves clusters out.

    What was stopped goes on when it is started again with the same options. On several GPUs: torchrun
    --nproc-per-node 8 $(which ifnd-fast-embed) ...; ranks change nothing in the file.

    Args:
        out: file to write, .npz or .parquet (pip install ifnd-fast[parquet]), which must not be there yet; until all
            features are computed they are kept in OUT.blocks
        features: of the backbone, or of a run's momentum encoder, the unit vectors that training compares
        part: of the data: training images, test images, or both
        rank_timeout: minutes after which a rank that does not answer ends the command, with several ranks
    """
    check_arguments(embed, rank_timeout=rank_timeout)
    refuse_folder("--out", out)
    embedding_file.check_kind(out)
    if out.exists():
        raise UsageError(f"--out {out} is there already: give another name")
    distributed.ranks_in_environment()  # says what is wrong there
    distributed.start(pick_device(common.device), rank_timeout)
    subject = Subject(common, several_ranks=True)
    if features == "encoder":
        subject.network = load_encoder(common.checkpoint, subject.config, subject.state).to(subject.compute.device)
    parts = _open(subject, part)
    folder = out.with_name(f"{out.name}.blocks")
    with ExitStack() as held:
        with distributed.raise_on_all_ranks(True):
            if distributed.rank() == 0:
                held.enter_context(run_folder.locked(folder))
        blocks = FeatureBlocks(folder, _settings(subject, parts))
        for name, images in parts.items():
            blocks.compute(name, images, subject.network, subject.data, subject.compute)
        if distributed.rank() == 0:  # alone: ranks change nothing
            found = _gathered(subject, parts, blocks, clustering)
            with stage("writing"):
                embedding_file.write(out, found)
            shutil.rmtree(folder)
            _tell(subject, found, out)


def _open(subject: Subject, part: str) -> dict[str, Images]:
    """The images by part, the same ones on all ranks.

    Raises:
        UsageError: there are none of that part, or ranks find different ones.
    """
    data = subject.data
    with distributed.raise_on_all_ranks(True):  # one may have no such folder
        train, test = open_for_run(data)
        assert train is not None
        parts = {"train": train} | ({} if test is None else {"test": test})
        if part != "all" and part not in parts:
            raise UsageError(f"--part {part}: --data {data.data} has no test part")
    identity.agree(listings(train, test), f"--data {data.data}")
    tell_found(data, train, test)
    return parts if part == "all" else {part: parts[part]}


def _settings(subject: Subject, parts: dict[str, Images]) -> dict[str, Any]:
    """All that the features depend on."""
    weights = identity.content_of(*(weight.cpu().numpy() for weight in subject.network.state_dict().values()))
    images = identity.identity_of({name: images.listing() for name, images in parts.items()})
    view = {name: getattr(subject.data, name) for name in ("image_size", "pixel_mean", "pixel_std")}
    return {
        **{name: list(value) if isinstance(value, tuple) else value for name, value in view.items()},
        "images": images, "weights": weights, "mixed precision": str(subject.compute.amp),
        "images a block": BATCH * BATCHES,
    }  # fmt: skip


def _gathered(subject: Subject, parts: dict[str, Images], blocks: FeatureBlocks, clustering: LevelOptions) -> Embedded:
    """What was computed of the images that can be read, with their clusters.

    Raises:
        CommandError: none can be read, or one can't and the data are --strict, or the features can't be clustered.
    """
    names, of_part, vectors, labels = [], [], [], []
    for part, images in parts.items():
        found, listed = blocks.read(part, images), images.listing().names
        readable = np.flatnonzero(found.reasons == "")
        unreadable = Unreadable(images, subject.data.strict)
        for index in np.flatnonzero(found.reasons != "").tolist():
            unreadable.add(index, str(found.reasons[index]))
        subject.remember(unreadable)
        names += [shown(listed[index]) if listed else images.name(index) for index in readable.tolist()]
        of_part += [part] * len(readable)
        vectors.append(found.vectors[readable])
        labels.append(None if images.labels is None else images.labels[readable])
    if not names:
        raise CommandError(f"--data {subject.data.data}: none of the images can be read")
    rows = np.concatenate(vectors)
    if clustering.levels == ():
        clusters = ImageClusters((), torch.empty(len(rows), 0, dtype=torch.int32), torch.empty(len(rows), 0))
    else:
        on_device, usable = torch.from_numpy(rows).to(subject.compute.device), torch.ones(len(rows), dtype=torch.bool)
        clusters = cluster_vectors(on_device, usable.to(on_device.device), subject.config, clustering)
    classes = None if any(of is None for of in labels) else np.concatenate([of for of in labels if of is not None])
    named = next(iter(parts.values())).class_names if classes is not None else None
    return Embedded(
        names, of_part, rows, classes, named or [], clusters.levels, clusters.labels.numpy(),
        clusters.confidence.numpy(),
    )  # fmt: skip


def _tell(subject: Subject, found: Embedded, out: Path) -> None:
    n, dim = found.vectors.shape
    levels = ", ".join(f"{count:,}" for count in found.levels) or "none"
    rows = [["images", f"{n:,}"], ["left out", f"{len(subject.unreadable):,}"], ["dimensions", f"{dim:,}"],
            ["clusters", levels]]  # fmt: skip
    figures = {"file": str(full_path(out)), "images": n, "dimensions": dim, "levels": list(found.levels)}
    subject.write_result(f"Features in {out}", ["of", "there are"], rows, figures)
