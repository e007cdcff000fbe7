"""ifnd-fast-eval clusters and false-negatives: the figures by definition, and the commands on real runs."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ifnd_fast import config
from ifnd_fast.config import Config
from ifnd_fast.contrast.encoder import build
from ifnd_fast.contrast.models import InBatch
from ifnd_fast.data import features
from ifnd_fast.data.sources import open_images
from ifnd_fast.evaluate.cluster_images import ClusterOptions
from ifnd_fast.evaluate.clusters import clusters
from ifnd_fast.evaluate.false_negatives import false_negatives
from ifnd_fast.evaluate.subject import Options
from ifnd_fast.metrics.clusters import agreement
from ifnd_fast.metrics.false_negatives import detection_statistics
from ifnd_fast.runtime import checkpoint
from ifnd_fast.runtime.compute import Compute
from ifnd_fast.runtime.errors import UsageError
from ifnd_fast.training.saved_run import load_encoder
from ifnd_fast.training.saved_state import SavedState
from tests.conftest import TINY
from tests.forked import command


@given(seed=st.integers(0, 10_000), n=st.integers(2, 40), classes=st.integers(1, 5), n_clusters=st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_rand_index_and_purity_by_pairs_and_counts(seed, n, classes, n_clusters):
    rng = np.random.default_rng(seed)
    truth, labels = rng.integers(0, classes, n), rng.integers(0, n_clusters, n)
    found = agreement(truth, labels)
    hits = sum(Counter(truth[labels == cluster]).most_common(1)[0][1] for cluster in set(labels))
    assert found["purity"] == pytest.approx(hits / n)

    pairs = list(combinations(range(n), 2))
    same_class = np.array([truth[i] == truth[j] for i, j in pairs])
    same_cluster = np.array([labels[i] == labels[j] for i, j in pairs])
    both, expected = (same_class & same_cluster).sum(), same_class.sum() * same_cluster.sum() / len(pairs)
    most = (same_class.sum() + same_cluster.sum()) / 2
    if most != expected:
        assert found["adjusted_rand_index"] == pytest.approx((both - expected) / (most - expected))


def test_normalised_mutual_information_by_definition():
    truth, labels = np.array([0, 0, 0, 1, 1, 2]), np.array([4, 4, 7, 7, 7, 7])
    joint = np.array([[2, 1], [0, 2], [0, 1]]) / 6
    p, q = joint.sum(axis=1), joint.sum(axis=0)
    information = sum(joint[i, j] * np.log(joint[i, j] / (p[i] * q[j])) for i, j in np.argwhere(joint > 0))
    entropy = [-(share * np.log(share)).sum() for share in (p, q)]
    assert agreement(truth, labels)["normalized_mutual_information"] == pytest.approx(information / np.mean(entropy))


def test_the_classes_themselves_agree_and_chance_does_not():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 10, 3000)
    perfect, chance = agreement(truth, 9 - truth), agreement(truth, rng.integers(0, 10, 3000))
    assert list(perfect.values()) == pytest.approx([1.0] * 4)
    assert abs(chance["adjusted_mutual_information"]) < 0.01 and abs(chance["adjusted_rand_index"]) < 0.01
    assert 0.1 < chance["purity"] < 0.16


# ---- the commands ----


@pytest.fixture(scope="module")
def run(digit_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("clusters") / "run"
    done = command("train", "--data", digit_folder, "--out", out, *TINY)
    assert done.returncode == 0, done.stderr
    return out


def test_false_negatives_of_the_runs_own_labels(run, tmp_path):
    plot, figures = tmp_path / "curves.png", tmp_path / "figures.json"
    done = command("evaluate", "false-negatives", run, "--plot", plot, "--json-file", figures)
    assert done.returncode == 0, done.stderr
    assert "the run's own labels of epoch 3" in done.stdout and str(plot) in done.stdout
    assert Image.open(plot).size[0] > 500

    found = json.loads(figures.read_text())
    assert found["levels"] == [3, 6] and found["acceptance_rate"] == [rate / 100 for rate in range(101)]
    own = checkpoint.load_latest(run)["pseudo_labels"]["labels"]
    truth = np.repeat(np.arange(5), 24)
    at_the_end = detection_statistics(own, own, torch.arange(120), truth)
    for key, values in at_the_end.items():
        assert [level[-1] for level in found[key]] == values
    assert all(0 <= share <= 1 for level in found["false_negative_recall"] for share in level)


def test_clusters_of_the_encoder_that_training_clusters(run, tmp_path):
    done = command("evaluate", "clusters", run, "--levels", "5", "8", "--json-file", tmp_path / "clusters.json")
    assert done.returncode == 0, done.stderr
    assert "Clusters of encoder features" in done.stdout and "purity" in done.stdout
    found = json.loads((tmp_path / "clusters.json").read_text())
    assert found["features"] == "encoder" and found["levels"] == [5, 8] and found["cluster_empty"] == [0, 0]
    assert all(0 < purity <= 1 for purity in found["purity"]) and 0.2 <= found["cluster_largest"][0] < 1


def test_clusters_of_a_bare_backbone(run, tmp_path):
    figures = tmp_path / "clusters.json"
    clusters(Options(run / "backbone.pt", workers=0, json_file=figures), ClusterOptions(levels=(5,)))
    assert json.loads(figures.read_text())["features"] == "backbone"


def test_other_data_is_clustered_anew(run, digit_folder, tmp_path):
    fewer = tmp_path / "fewer"
    for label in range(2):
        (fewer / str(label)).mkdir(parents=True)
        for file in sorted((digit_folder / f"digit-{label}").iterdir())[:10]:
            (fewer / str(label) / file.name).write_bytes(file.read_bytes())
    figures = tmp_path / "figures.json"
    false_negatives(Options(run, str(fewer), workers=0, json_file=figures), ClusterOptions())
    found = json.loads(figures.read_text())
    assert found["source"] == "clusters of encoder features" and found["data"] == str(fewer)
    assert found["false_negative_recall"][0][-1] > 0


def test_the_momentum_encoder_is_loaded(run, digit_folder):
    settings_ = config.load(run / "config.yaml")
    encoder = load_encoder(run, settings_)
    weights = checkpoint.load_latest(run)["model"]
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, weights[f"key_encoder.{name}"])
    images = open_images(str(digit_folder))
    found, _ = features.extract(encoder, images, settings_.data, Compute(torch.device("cpu")))
    assert torch.allclose(found.norm(dim=1), torch.ones(120), atol=1e-5)


def test_an_in_batch_run_has_one_encoder(tmp_path):
    settings_ = Config()
    torch.manual_seed(0)
    model = InBatch(build(settings_.model)())
    checkpoint.save(tmp_path, {"step": 1, "model": model.state_dict()})
    encoder = load_encoder(tmp_path, settings_)
    assert torch.equal(encoder.head[2].weight, model.query_encoder.head[2].weight)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"levels": (500,)}, "--levels 500: more clusters than the 120 images"),
        ({"levels": (0,)}, "--levels must be 2 or more, got 0"),
        ({"confidence_temperature": 0.0}, r"--confidence-temperature must be from 1e-06 to 1e\+06, got 0.0"),
        ({"levels": (5, 5)}, "--levels must differ from each other, got 5 5"),
        ({"kmeans_iterations": 0}, "--kmeans-iterations must be 1 or more, got 0"),
    ],
)
def test_bad_options_are_named(run, options, words):
    with pytest.raises(UsageError, match=words):
        clusters(Options(run, workers=0), ClusterOptions(**options))


def test_data_and_files_that_do_not_do(run, flat_folder):
    with pytest.raises(UsageError, match="needs true labels"):
        clusters(Options(run, str(flat_folder), workers=0), ClusterOptions())
    with pytest.raises(UsageError, match="--plot curves.txt: give a name that ends in one of .png"):
        false_negatives(Options(run), ClusterOptions(), Path("curves.txt"))
    with pytest.raises(UsageError, match="is not the folder of a run; --features backbone"):
        clusters(Options(run / "backbone.pt", workers=0), ClusterOptions(features="encoder"))


def test_a_runs_clustering_knows_which_images_had_features():
    state = {
        "pseudo_labels": {"levels": torch.tensor([2]), "labels": torch.tensor([[1], [0]], dtype=torch.int32),
                          "confidence": torch.tensor([[0.9], [0.8]])},
        "cluster_waiting": {"usable": torch.tensor([True, False, True])},
    }  # fmt: skip
    found = SavedState(state).clustering()
    assert found.levels == (2,) and found.labels.tolist() == [[1], [-1], [0]]
    assert found.confidence.flatten().tolist() == pytest.approx([0.9, 0.0, 0.8])
    assert found.explains(torch.tensor([[1], [-1], [-1]])) and not found.explains(torch.tensor([[0], [-1], [-1]]))
    assert SavedState({"pseudo_labels": {"levels": torch.tensor([2])}}).clustering() is None
