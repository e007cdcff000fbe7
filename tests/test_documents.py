"""README, CONTRIBUTING and docs/: their Python runs, their commands parse, and their links lead somewhere."""

from __future__ import annotations

import functools
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset

import ifnd_fast
from ifnd_fast import cli
from ifnd_fast import config as configs
from ifnd_fast.config import PRESETS
from ifnd_fast.runtime.checkpoint import FORMAT

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/gpu/*.md")])

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="needs the source tree")


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


def commands(document: Path) -> list[tuple[str, list[str]]]:
    """(train, eval or report, its arguments) of every command, in blocks for a shell and, with arguments, between
    backticks."""
    text = document.read_text()
    lines = [line for block in blocks(document, "sh") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(ifnd-fast-\w+ [^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    found = []
    for line in lines:
        words = shlex.split(line, comments=True) if "ifnd-fast-" in line else []
        while name := next((word for word in words if re.fullmatch(r"ifnd-fast-\w+\)?", word)), None):
            words = words[words.index(name) + 1 :]
            end = next((i for i, word in enumerate(words) if word in ("&&", "||", ";", "|")), len(words))
            found.append((name.removeprefix("ifnd-fast-").removesuffix(")"), words[:end]))
    return found


def parse(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command does before its work, which is left out. SystemExit: the arguments are wrong, or --help."""
    if name == "train":
        cli.parse_train(arguments)
        return
    from ifnd_fast.evaluate import embed, export
    from ifnd_fast.evaluate.tasks import TASKS

    for task, function in TASKS.items():
        monkeypatch.setitem(TASKS, task, functools.wraps(function)(lambda *_, **__: None))
    monkeypatch.setattr(cli, "_write_report", lambda *_: None)
    for module, function in ((export, "export"), (embed, "embed")):
        monkeypatch.setattr(module, function, functools.wraps(getattr(module, function))(lambda *_, **__: None))
    monkeypatch.setattr(sys, "argv", [f"ifnd-fast-{name}", *arguments])
    {"eval": cli.evaluate, "report": cli.report, "export": cli.export, "embed": cli.embed}[name]()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the documents' commands are given: runs/mine is a run, of the preset imagenet."""
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/config.yaml").write_text(configs.to_yaml(PRESETS["imagenet"][1]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


EVERY_COMMAND = [(document.name, *command) for document in DOCUMENTS for command in commands(document)]


@pytest.mark.parametrize(
    ("document", "name", "arguments"), EVERY_COMMAND, ids=[f"{d}-{n} {shlex.join(a)}" for d, n, a in EVERY_COMMAND]
)
def test_commands_parse(document, name, arguments, folder, monkeypatch, capsys):
    try:
        parse(name, arguments, monkeypatch)
    except SystemExit as stop:
        assert stop.code == 0 and "--help" in arguments, capsys.readouterr()


def test_commands_are_found():
    assert {name for _, name, _ in EVERY_COMMAND} == {"train", "eval", "report", "export", "embed"} and len(
        EVERY_COMMAND
    ) > 15


@pytest.mark.parametrize(
    ("name", "arguments"), [("train", "--no-such 1"), ("eval", "knn runs/mine --no-such 1"), ("report", "--no-such 1")]
)
def test_a_wrong_command_would_be_seen(name, arguments, folder, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(name, arguments.split(), monkeypatch)
    assert stop.value.code == 2


def stand_ins() -> dict[str, object]:
    """What the blocks take as given: a step's batch with the labels of all images, and features to cluster."""
    generator = torch.Generator().manual_seed(0)

    def rows(n: int, dim: int) -> torch.Tensor:
        return normalize(torch.randn(n, dim, generator=generator))

    return {
        "torch": torch,
        "ifnd_fast": ifnd_fast,
        "query": rows(32, 128).requires_grad_(),  # of an encoder
        "key": rows(32, 128),
        "indices": torch.arange(32),  # of the batch's images in the data set
        "labels": torch.randint(-1, 10, (1000, 3), generator=generator, dtype=torch.int32),
        "features": rows(3000, 16),
        "centroids": rows(50, 16),
        "embeddings": rows(32, 128).requires_grad_(),
        "classes": torch.arange(32) % 8,
        "pixels": torch.randint(256, (256, 16, 16, 3), generator=generator, dtype=torch.uint8).numpy(),
        **lightning_stand_ins(rows(200, 16)),
    }


def lightning_stand_ins(images: torch.Tensor) -> dict[str, object]:
    class Encoder(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return normalize(super().forward(x))

    numbers = torch.arange(len(images))
    return {
        "encoder": Encoder(16, 128),
        "image_loader": DataLoader(TensorDataset(images, numbers), batch_size=64),
        "view_loader": DataLoader(TensorDataset(images, images + 0.01, numbers), batch_size=64),
        "epochs": 2,
    }


PYTHON = {
    f"{document.name}, block {n + 1}": block
    for document in DOCUMENTS
    for n, block in enumerate(blocks(document, "python"))
}
BACKBONE = "runs/mine/backbone.pt"


@pytest.mark.parametrize("block", [name for name, block in PYTHON.items() if BACKBONE not in block])
def test_python_runs(block, folder):
    given = stand_ins()
    names = dict(given)
    exec(compile(PYTHON[block], block, "exec"), names)
    if "loss.backward()" in PYTHON[block]:
        assert names["loss"].isfinite() and given["query"].grad.isfinite().all() and names["queue"].count == 32
    if "lightning.Trainer" in PYTHON[block]:
        assert names["queue"].queue.count == 400 and names["renewal"].acceptance_rate == 0.5
        assert (names["queue"].labels >= 0).sum(0).tolist() == [100, 100]
    elif "Loss" in PYTHON[block]:
        assert names["loss"].isfinite()
    if "ifnd_fast.pretrain" in PYTHON[block]:
        assert names["result"]["seconds"] > 0 and (folder / "runs/my-network/backbone.pt").exists()
    if "accepted = " in PYTHON[block]:
        assert names["confidence"].shape == (3000,)
        assert [len(level.centroids) for level in names["levels"]] == [1000, 2000]
        assert (names["accepted"] >= 0).sum(0).tolist() == [900, 900]


def test_the_backbone_is_torchvisions(folder):
    """The block that loads backbone.pt into torchvision's ResNet, given a ResNet-50 such as a run exports."""
    torchvision = pytest.importorskip("torchvision")
    from ifnd_fast.contrast.encoder import resnet

    [block] = [block for block in PYTHON.values() if BACKBONE in block]
    exported = resnet(PRESETS["imagenet"][1].model)[0].state_dict()
    torch.save(exported, BACKBONE)
    names = {"torch": torch, "torchvision": torchvision}
    exec(block, names)
    loaded = names["network"].state_dict()
    assert set(loaded) - set(exported) == {"fc.weight", "fc.bias"} and set(exported) < set(loaded)
    assert all(torch.equal(loaded[name], value) for name, value in exported.items())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), target


def test_stable_names_are_there():
    """README's section names every public name, command and section of config.yaml, and the checkpoints' format."""
    section = (ROOT / "README.md").read_text().partition("## Stable names")[2].partition("\n## ")[0]
    stable, _, rest = section.partition("Everything else")
    sections = [name for name, value in configs.to_dict(PRESETS["demo"][1]).items() if isinstance(value, dict)]
    assert {*ifnd_fast.__all__, *sections} <= set(re.findall(r"`(\w+)`", stable)) and rest
    assert f'"{FORMAT}"' in stable and all(
        f"`ifnd-fast-{name}`" in stable for name in ("train", "eval", "report", "export", "embed")
    )
