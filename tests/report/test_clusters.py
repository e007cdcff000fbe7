from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ifnd_fast.clustering.image_clusters import ImageClusters
from ifnd_fast.report.clusters import choose_clusters, cluster_sheets
from ifnd_fast.report.page import write_report
from tests.report.runs import FIGURES, LEVELS, N, Page, clustered, figure_titles


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
    clustering = ImageClusters((5,), labels, torch.linspace(1, 0, 120)[:, None])
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
    clustering = ImageClusters((2,), (torch.arange(120) % 2).int()[:, None], torch.rand(120, 1))
    (sheet,), _ = cluster_sheets(images, clustering, ["2 clusters"])
    assert not sheet.has_wrong and "%" not in sheet.rows[0].note


def test_a_hundred_thousand_clusters():
    labels = torch.randint(100_000, (120, 1), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    (sheet,), _ = cluster_sheets(Grey(), ImageClusters((100_000,), labels, torch.rand(120, 1)), ["100,000 clusters"])
    assert len(sheet.rows) >= 6 and "empty" in sheet.note


def test_clusters_and_detection_at_every_rate(make_run):
    page = write_report(make_run(state=clustered())).read_text()
    assert figure_titles(page) == [*FIGURES, "Precision and recall at every acceptance rate"]
    assert "confidence 0." in page and "Dotted: the rate in use, 100%" in page
    assert "its true class is not the cluster" in page and page.count(", mean confidence") == sum(LEVELS)
    assert len(ids := [e["id"] for _, e in Page(page).elements if "id" in e]) == len(set(ids))

    waiting = clustered() | {"accepted": torch.zeros(N, 2, dtype=torch.int32)}  # an older clustering's are in use
    page = write_report(make_run(state=waiting)).read_text()
    assert "up to 10, at even steps in order" in page and page.count(", mean confidence") == sum(LEVELS)


def test_clusters_without_true_classes(make_run):
    out = make_run(state=clustered(), data=make_run.images(classes=False))
    page = write_report(out).read_text()
    assert page.count(", mean confidence") == sum(LEVELS) and 'class="thumb wrong"' not in page
    assert "Precision and recall at every acceptance rate" not in figure_titles(page)
