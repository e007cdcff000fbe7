from __future__ import annotations

import numpy as np
import pytest
import torch

from ifnd_fast.report.embedding import draw_embedding, embed
from ifnd_fast.report.page import write_report
from ifnd_fast.report.plots import draw_picture
from ifnd_fast.training.saved_state import SavedState
from tests.report.runs import clustered, figure_titles


def test_features_in_the_plane(make_run):
    queue = {
        "features": torch.nn.functional.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0))),
        "indices": torch.arange(40), "_extra_state": torch.tensor([0, 40]),
    }  # fmt: skip
    page = write_report(make_run(state={"negatives": queue})).read_text()
    assert figure_titles(page)[-1] == "Features in the plane (PCA)" and "Coloured by true class." in page

    keep = {"contrast": {"false_negatives": "keep"}}
    page = write_report(make_run(config=keep, state={"negatives": queue})).read_text()
    assert figure_titles(page)[-1] == "Features in the plane (PCA)" and "This run clusters nothing." in page

    out = make_run(state=clustered() | {"negatives": queue}, data=make_run.images(classes=False) / "gone")
    assert "Coloured by cluster of 3 clusters." in write_report(out).read_text()


def test_the_queues_newest_key_of_each_image_counts():
    features = torch.arange(12.0).reshape(6, 2)
    full = {"features": features, "indices": torch.tensor([4, 7, 4, 9, 7, 4]), "_extra_state": torch.tensor([3, 6])}
    found = SavedState({"negatives": full}).features()  # slots from oldest to newest: 3 4 5 0 1 2
    assert found.indices.tolist() == [4, 7, 9]
    assert torch.equal(torch.from_numpy(found.features), features[[2, 1, 3]])
    indices = torch.tensor([4, 7, 4, -1, -1, -1])
    filling = {"features": features, "indices": indices, "_extra_state": torch.tensor([3, 3])}
    assert torch.equal(torch.from_numpy(SavedState({"negatives": filling}).features().features), features[[2, 1]])


def test_the_bank_stands_in_for_a_queue():
    bank = torch.eye(3).bfloat16()
    bank[1] = 0  # not seen yet
    found = SavedState({"negatives": None, "bank": bank}).features()
    assert found.indices.tolist() == [0, 2] and found.features.dtype == np.float32 and "bank" in found.source
    assert SavedState({"negatives": None, "bank": None}).features() is None


def test_many_keys_are_sampled_always_alike():
    queue = {"features": torch.rand(5000, 4), "indices": torch.arange(5000), "_extra_state": torch.tensor([0, 5000])}
    queue["features"][17] = torch.nan
    first, second = (SavedState({"negatives": queue}).features(most=4999) for _ in range(2))
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
    features = SavedState({"negatives": queue}).features()
    picture = draw_picture("embedding", draw_embedding, features, groups, names, "class")
    assert picture.title == "Features in the plane (PCA)" and "the 12 commonest" in picture.caption
    assert "a name of 20 …" in picture.svg and "others" in picture.svg and "a name of 15" not in picture.svg


def test_no_picture_of_two_points():
    queue = {"features": torch.rand(2, 4), "indices": torch.arange(2), "_extra_state": torch.tensor([0, 2])}
    assert draw_picture("embedding", draw_embedding, SavedState({"negatives": queue}).features(), None, [], "") is None
