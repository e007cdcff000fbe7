"""ifnd-fast-eval clusters: how well clusters of the features agree with true classes."""

from __future__ import annotations

import torch
import tyro

from ifnd_fast.evaluate.cluster_images import ClusterOptions, cluster_images, labelled_training_images
from ifnd_fast.evaluate.subject import Options, Subject
from ifnd_fast.metrics.clusters import agreement, quality
from ifnd_fast.runtime.console import track

SHARES = {
    "adjusted_mutual_information": "AMI",
    "normalized_mutual_information": "NMI",
    "adjusted_rand_index": "ARI",
    "purity": "purity",
    "cluster_largest": "in largest 1 %",
}


def clusters(
    options: tyro.conf.OmitArgPrefixes[Options],
    clustering: tyro.conf.OmitArgPrefixes[ClusterOptions],
) -> None:
    """Agreement of the training images' clusters with their true classes, at each level.

    AMI, NMI, ARI (1: the same partition; AMI and ARI 0: chance), purity (share of the images whose class is their
    cluster's commonest; it rises with the number of clusters), balance (share of the images in the largest 1 % of the
    clusters, at least one) and empty clusters. AMI's time grows with clusters times classes.
    """
    subject = Subject(options)
    images, truth = labelled_training_images(subject.data)
    found, kind = cluster_images(subject, subject.config, images, clustering)
    balance = quality(found.labels, torch.full_like(found.labels, -1), found.levels)
    levels = []
    for level in track(range(len(found.levels)), "comparing with classes", len(found.levels)):
        clustered = found.labels[:, level].numpy() >= 0
        figures = agreement(truth[clustered], found.labels[:, level].numpy()[clustered])
        levels.append(figures | {key: values[level] for key, values in balance.items()})
    subject.write_result(
        f"Clusters of {kind} features against the classes of {subject.data.data}",
        ["clusters", *SHARES.values(), "empty"],
        [
            [f"{n_clusters:,}", *(f"{of_level[key]:.3f}" for key in SHARES), f"{of_level['cluster_empty']:,}"]
            for n_clusters, of_level in zip(found.levels, levels, strict=True)
        ],
        {"features": kind, "levels": list(found.levels)} | {key: [of[key] for of in levels] for key in levels[0]},
    )
