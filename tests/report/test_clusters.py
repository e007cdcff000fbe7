from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ifnd_fast.clustering.image_clusters import Clustering
from ifnd_fast.report.clusters import choose_clusters, cluster_sheets
from ifnd_fast.report.embedding import draw_embedding, embed
from ifnd_fast.report.plots import draw_picture
from ifnd_fast.training.saved_run import stored_features


class Grey:
    """120 grey images of 4 classes."""

    labels = np.arange(120) % 4
    class_names = ["ash", "birch", "cedar", "dogwood"]

    def __len__(self):
        return 120

    def image(self, index):
        return Image.new("L", (9, 5), index)


@given(seed=st.integers(0, 10_000), n=st.integers(1, 80), n_clusters=st.integers(1, 40))
@settings(max_examples=80, deadline=None)
def test_the_clusters_shown_are_what_the_page_says(seed, n, n_clusters):
    rng = np.random.default_rng(seed)
    labels, confidence = rng.integers(-1, n_clusters, n), rng.random(n)
    chosen = choose_clusters(labels, confidence, n_clusters)
    assert chosen == choose_clusters(labels, confidence, n_clusters)
    names = [cluster for cluster, _ in chosen]
    size = {cluster: int((labels == cluster).sum()) for cluster in range(n_clusters)}
    held = [cluster for cluster in size if size[cluster]]
    assert len(names) == len(set(names)) <= 12 and set(names) <= set(held)
    if len(held) <= 12:
        assert names == sorted(held, key=lambda cluster: (-size[cluster], cluster))
        return
    mean = {cluster: confidence[labels == cluster].mean() for cluster in held}
    largest = names[:3]
    assert largest == sorted(held, key=lambda cluster: (-size[cluster], cluster))[:3]
    others = [cluster for cluster in held if size[cluster] > 1 and cluster not in largest]
    sure = [cluster for cluster, why in chosen if why == "most confident"]
    assert sure == sorted(others, key=lambda cluster: -mean[cluster])[:3]
    unsure = [cluster for cluster, why in chosen if why == "least confident"]
    assert unsure == sorted(set(others) - set(sure), key=lambda cluster: mean[cluster])[:3]


def test_sheets_tell_sizes_and_mark_by_the_commonest_class():
    labels = torch.full((120, 1), -1, dtype=torch.int32)
    labels[:10] = 2  # classes 0 1 2 3 0 1 2 3 0 1: three of 0 and of 1, the lower counts
    labels[20:21] = 0
    clustering = Clustering((5,), labels, torch.linspace(1, 0, 120)[:, None])
    (sheet,), explanation = cluster_sheets(Grey(), clustering, ["5 clusters"])
    assert sheet.note == "1 to 10 images each, median 6; 3 empty"
    first, second = sheet.rows
    assert (first.name, second.name) == ("cluster 2", "cluster 0") and first.anchor is None
    assert first.note == "10 images, 30% “ash”, mean confidence 0.96"
    assert second.note == "1 image, 100% “ash”, mean confidence 0.83"
    assert [thumbnail.wrong for thumbnail in first.shown] == [i % 4 != 0 for i in range(10)]
    assert "12" in explanation and "even steps" in explanation


def test_without_true_classes_nothing_is_wrong():
    images = Grey()
    images.labels = None
    clustering = Clustering((2,), (torch.arange(120) % 2).int()[:, None], torch.rand(120, 1))
    (sheet,), _ = cluster_sheets(images, clustering, ["2 clusters"])
    assert not sheet.has_wrong and "%" not in sheet.rows[0].note


def test_a_hundred_thousand_clusters():
    labels = torch.randint(100_000, (120, 1), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    (sheet,), _ = cluster_sheets(Grey(), Clustering((100_000,), labels, torch.rand(120, 1)), ["100,000 clusters"])
    assert len(sheet.rows) >= 6 and "empty" in sheet.note


# ---- features in the plane ----


def test_the_queues_newest_key_of_each_image_counts():
    features = torch.arange(12.0).reshape(6, 2)
    full = {"features": features, "indices": torch.tensor([4, 7, 4, 9, 7, 4]), "_extra_state": torch.tensor([3, 6])}
    found = stored_features({"negatives": full})  # slots from oldest to newest: 3 4 5 0 1 2
    assert found.indices.tolist() == [4, 7, 9]
    assert torch.equal(torch.from_numpy(found.features), features[[2, 1, 3]])
    indices = torch.tensor([4, 7, 4, -1, -1, -1])
    filling = {"features": features, "indices": indices, "_extra_state": torch.tensor([3, 3])}
    assert torch.equal(torch.from_numpy(stored_features({"negatives": filling}).features), features[[2, 1]])


def test_the_bank_stands_in_for_a_queue():
    bank = torch.eye(3).bfloat16()
    bank[1] = 0  # not seen yet
    found = stored_features({"negatives": None, "bank": bank})
    assert found.indices.tolist() == [0, 2] and found.features.dtype == np.float32 and "bank" in found.source
    assert stored_features({"negatives": None, "bank": None}) is None


def test_many_keys_are_sampled_always_alike():
    queue = {"features": torch.rand(5000, 4), "indices": torch.arange(5000), "_extra_state": torch.tensor([0, 5000])}
    queue["features"][17] = torch.nan
    first, second = (stored_features({"negatives": queue}, most=4999) for _ in range(2))
    assert len(set(first.indices.tolist())) == len(first.indices) <= 4999 and 17 not in first.indices
    assert np.array_equal(first.indices, second.indices) and np.array_equal(first.features, second.features)
    assert np.array_equal(first.features, queue["features"].numpy()[first.indices])


@pytest.mark.parametrize("n, method", [(3, "PCA"), (120, "t-SNE")])
def test_groups_that_are_apart_stay_apart(n, method):
    rng = np.random.default_rng(0)
    group = np.arange(n) % 3
    features = (np.eye(3, 8)[group] + 0.01 * rng.standard_normal((n, 8))).astype(np.float32)
    points, name = embed(features)
    assert name == method and points.shape == (n, 2) and np.isfinite(points).all()
    assert np.array_equal(points, embed(features)[0])
    centres = np.stack([points[group == g].mean(axis=0) for g in range(3)])
    nearest = ((points[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
    assert np.array_equal(nearest, group)


@pytest.mark.parametrize("n", [3, 120])
def test_a_collapsed_encoder_is_one_point(n):
    points, _ = embed(np.full((n, 8), 0.5, dtype=np.float32))
    assert np.array_equal(points, np.zeros((n, 2)))


def test_the_commonest_groups_are_coloured():
    queue = {"features": torch.rand(40, 4), "indices": torch.arange(40), "_extra_state": torch.tensor([0, 40])}
    groups = np.minimum(np.arange(40), 20)  # 20 of one image each, and one of twenty
    names = [f"a name of {i} that is long" for i in range(21)]
    picture = draw_picture("embedding", draw_embedding, stored_features({"negatives": queue}), groups, names, "class")
    assert picture.title == "Features in the plane (PCA)" and "the 12 commonest" in picture.caption
    assert "a name of 20 …" in picture.svg and "others" in picture.svg and "a name of 15" not in picture.svg


def test_no_picture_of_two_points():
    queue = {"features": torch.rand(2, 4), "indices": torch.arange(2), "_extra_state": torch.tensor([0, 2])}
    assert draw_picture("embedding", draw_embedding, stored_features({"negatives": queue}), None, [], "") is None
