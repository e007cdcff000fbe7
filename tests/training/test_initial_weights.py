"""Training that starts from weights: they are in both encoders, or the run does not begin."""

from __future__ import annotations

import pytest
import torch

from ifnd_fast.cli import parse_train
from ifnd_fast.config import ModelConfig
from ifnd_fast.contrast.encoder import resnet
from ifnd_fast.runtime.errors import CommandError, UsageError
from ifnd_fast.training.trainer import Trainer
from tests.conftest import TINY


def start(out, data, *options) -> Trainer:
    return Trainer(parse_train(["--out", str(out), "--data", str(data), *TINY, *map(str, options)]))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(3)
    state = {f"module.encoder_q.{name}": value for name, value in resnet(ModelConfig(width=8))[0].state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "moco.pth.tar"
    torch.save({"state_dict": state | {"module.encoder_q.fc.0.weight": torch.ones(2)}}, path)
    return path


def test_both_encoders_start_from_the_file_and_a_resume_needs_it_no_more(file, digit_folder, tmp_path, capsys):
    copy = tmp_path / "copy.pt"
    copy.write_bytes(file.read_bytes())
    wanted = torch.load(file)["state_dict"]
    trainer = start(tmp_path / "run", digit_folder, "--weights", copy)
    for encoder in (trainer.model.query_encoder, trainer.model.key_encoder):
        for name, value in encoder.backbone.state_dict().items():
            assert torch.equal(value, wanted[f"module.encoder_q.{name}"]), name
    plain = start(tmp_path / "plain", digit_folder)
    assert torch.equal(plain.encoder.head[0].weight, trainer.encoder.head[0].weight)
    assert not torch.equal(plain.encoder.backbone.conv1.weight, trainer.encoder.backbone.conv1.weight)
    assert "starts from" in (told := capsys.readouterr().out) and "left out: 1 others" in told.replace("\n", " ")

    with trainer.open():
        next(trainer.epochs())
    copy.unlink()
    resumed = Trainer(parse_train(["--resume", "--out", str(tmp_path / "run")]))
    resumed.session.go_on(resumed)
    assert torch.equal(resumed.encoder.backbone.conv1.weight, trainer.encoder.backbone.conv1.weight)
    with pytest.raises(UsageError, match="--weights: the run has .*copy.pt, asked for .*moco.pth.tar"):
        parse_train(["--resume", "--out", str(tmp_path / "run"), "--weights", str(file)])


def test_a_run_or_its_backbone_starts_another(untrained_run, digit_folder, tmp_path):
    wanted = torch.load(untrained_run / "backbone.pt")["conv1.weight"]
    for source in (untrained_run, untrained_run / "backbone.pt"):
        trainer = start(tmp_path / "run", digit_folder, "--weights", source)
        assert torch.equal(trainer.encoder.backbone.conv1.weight, wanted)


def test_what_does_not_fit_is_refused_before_anything_is_looked_for(file, tmp_path):
    nowhere = tmp_path / "no-such-data"
    words = "--weights .*moco.pth.tar does not fit the network: .* They are of --arch resnet-small --stem cifar --width"
    with pytest.raises(UsageError, match=words):
        start(tmp_path / "run", nowhere, "--weights", file, "--width", 16)
    with pytest.raises(CommandError, match="absent.pt is missing"):
        start(tmp_path / "run", nowhere, "--weights", tmp_path / "absent.pt")
    torch.save({"anything": torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match="holds no such network: no .* in it, but anything"):
        start(tmp_path / "run", nowhere, "--weights", tmp_path / "w.pt")
    with pytest.raises(CommandError, match="holds no encoder 'encoder_k': choose one of .*encoder_q by .*--weights-"):
        start(tmp_path / "run", nowhere, "--weights", file, "--weights-encoder", "encoder_k")
    with pytest.raises(UsageError, match="--weights-encoder chooses from a file: give --weights too"):
        start(tmp_path / "run", nowhere, "--weights-encoder", "encoder_k")
    assert not (tmp_path / "run").exists()
