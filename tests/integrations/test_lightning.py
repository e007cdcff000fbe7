"""The callbacks in real trainings by Lightning (on two ranks: test_ranks.py)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset

import ifnd_fast

lightning = pytest.importorskip("lightning", reason="extra: lightning")

from ifnd_fast.integrations.lightning import KeyQueue, PseudoLabelRenewal  # noqa: E402

N, BATCH, LEVELS = 48, 16, (3, 6)
IMAGES = torch.randn(N, 5, generator=torch.Generator().manual_seed(0))
OTHER = IMAGES + 0.1 * torch.randn(N, 5, generator=torch.Generator().manual_seed(1))


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, images):
        return normalize(self.layers(images), dim=1)


class Contrast(lightning.LightningModule):
    """Notes each step's keys, and the labels at the start of each epoch."""

    def __init__(self, queue):
        super().__init__()
        torch.manual_seed(0)
        self.moco, self.queue, self.seen, self.labels = ifnd_fast.MoCo(Unit(), momentum=0.9), queue, [], []

    def forward(self, images):
        return self.moco.feature_encoder(images)

    def on_train_epoch_start(self):
        self.labels.append(self.queue.labels)
        assert self.moco.query_encoder.training and not self.moco.key_encoder.layers[0].weight.requires_grad

    def training_step(self, batch, _):
        query, key = self.moco(*batch[:2], shuffle_seed=self.global_step)
        self.seen.append((key, batch[2]))
        return self.queue.loss(query, key, batch[2])

    def validation_step(self, batch, _):
        assert self.queue.loss(*self.moco(*batch[:2]), batch[2]).isfinite()

    def on_train_batch_end(self, *_):
        self.moco.update_key_encoder()

    def configure_optimizers(self):
        return torch.optim.SGD(self.moco.query_encoder.parameters(), lr=0.1, momentum=0.9)


def images(**settings):
    return DataLoader(TensorDataset(IMAGES, torch.arange(N)), batch_size=20, **settings)


def train(folder, epochs=3, resume=None, callbacks=(), loader=None, **settings):
    queue = KeyQueue(40, dim=4, levels=2, temperature=0.5)
    renewal = PseudoLabelRenewal(loader or images(), queue, LEVELS, acceptance_end=0.8)
    model = Contrast(queue)
    views = DataLoader(TensorDataset(IMAGES, OTHER, torch.arange(N)), batch_size=BATCH)
    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=[queue, renewal, *callbacks], logger=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", default_root_dir=folder, num_sanity_val_steps=0,
        enable_checkpointing=bool(callbacks), **settings,
    )  # fmt: skip
    trainer.fit(model, views, views, ckpt_path=resume)
    return model, queue, renewal


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training of three epochs, and its checkpoint after the second."""
    folder = tmp_path_factory.mktemp("lightning")
    saving = lightning.pytorch.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=1)
    return *train(folder, callbacks=[saving]), folder / "epoch=1.ckpt"


def test_the_queue_has_the_keys_of_the_steps(trained):
    model, queue, *_ = trained
    assert len(model.seen) == 9 and queue.queue.count == 40
    keys, indices = (torch.cat(part) for part in zip(*model.seen, strict=True))
    slots = torch.arange(len(keys))[-40:] % 40
    assert torch.equal(queue.queue.features[slots], keys[-40:])
    assert torch.equal(queue.queue.indices[slots], indices[-40:])
    assert torch.equal(queue.queue.labels, queue.labels[queue.queue.indices])


def test_labels_are_renewed_before_every_epoch_but_the_first(trained):
    model, _, renewal, _ = trained
    first, second, third = model.labels
    assert first is None and renewal.acceptance_rate == pytest.approx(2 / 3 / 0.8)
    assert (second >= 0).sum(0).tolist() == [20, 20] and (third >= 0).sum(0).tolist() == [40, 40]  # 5/12, 5/6 of 48
    assert torch.equal(third, renewal.pseudo_labels.accept(renewal.acceptance_rate))


def test_a_resumed_training_ends_with_the_same_bits(trained, tmp_path):
    model, queue, renewal, checkpoint = trained
    again = train(tmp_path, resume=checkpoint)
    assert len(again[0].seen) == 3  # of the last epoch
    for name, value in model.state_dict().items():
        assert torch.equal(again[0].state_dict()[name], value), name
    for name, value in queue.queue.state_dict().items():
        assert torch.equal(again[1].queue.state_dict()[name], value), name
    assert torch.equal(again[1].labels, queue.labels)
    assert torch.equal(again[2].pseudo_labels.labels, renewal.pseudo_labels.labels)


def test_a_training_in_half_precision(tmp_path):
    queue = train(tmp_path, epochs=2, precision="bf16-true")[1]
    assert (queue.labels >= 0).any() and queue.queue.features.isfinite().all()


def test_what_does_not_fit_is_told(tmp_path):
    queue = KeyQueue(8, dim=4, levels=1)
    with pytest.raises(ValueError, match=r"levels has 2 levels, and the queue 1: make it by KeyQueue\(..., levels=2\)"):
        PseudoLabelRenewal(images(), queue, LEVELS)
    for settings, words in (
        ({"every_n_epochs": 0}, "every_n_epochs"),
        ({"acceptance_end": 0.0}, "acceptance_end"),
        ({"acceptance_max": 1.5}, "acceptance_max"),
        ({"temperature": 0.0}, "temperature"),
    ):
        with pytest.raises(ValueError, match=words):
            PseudoLabelRenewal(images(), queue, (3,), **settings)
    with pytest.raises(ValueError, match="the Trainer needs max_epochs, .* got -1"):
        train(tmp_path, epochs=-1, max_steps=4)
    with pytest.raises(ValueError, match="loader gave no features of 8 of 48 images"):
        train(tmp_path, epochs=2, loader=images(sampler=range(40)))
