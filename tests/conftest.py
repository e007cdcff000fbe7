"""Small real data that several tests share."""

from __future__ import annotations

import gc
import os
from pathlib import Path

# Read when torch is imported, also by the processes that tests start: sums of several threads round otherwise, and on
# small tensors they cost ten times what they do. Tests of several threads ask for them.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image

from tests import scenes

if not torch.cuda.is_available():  # for tests/gpu; read when Triton is imported, which any test may do before them
    os.environ["TRITON_INTERPRET"] = "1"


LONGEST = ["test_faults.py", "gpu/test_audit.py", "native/test_sanitizers.py", "gpu/test_operators.py",
           "training/test_trainer.py", "test_soak.py", "gpu/test_torch.py", "gpu/test_extremes.py"]  # fmt: skip


def pytest_collection_modifyitems(items):
    """The longest files first, that the processes of pytest-xdist end together (with --no-loadscope-reorder)."""
    files = [str(Path(__file__).parent / name) for name in LONGEST]
    items.sort(key=lambda item: files.index(str(item.path)) if str(item.path) in files else len(files))


def pytest_collection_finish():
    """What is imported stays: the garbage collector needs not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 real handwritten digits, 8 x 8, scaled to 0..255 uint8, and their labels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return (pixels * 255 / 16).astype(np.uint8).reshape(-1, 8, 8), labels


@pytest.fixture(scope="session")
def digit_folder(digits, tmp_path_factory) -> Path:
    """A folder of 24 PNG files for each of the digits 0 to 4, one sub-folder a class."""
    root = tmp_path_factory.mktemp("digits")
    pixels, labels = digits
    for label in range(5):
        (root / f"digit-{label}").mkdir()
        for number, image in enumerate(pixels[labels == label][:24]):
            Image.fromarray(image).resize((16, 16)).save(root / f"digit-{label}" / f"{number:03d}.png")
    return root


@pytest.fixture(scope="session")
def flat_folder(digit_folder, tmp_path_factory) -> Path:
    """The same images in one folder, without classes."""
    root = tmp_path_factory.mktemp("flat")
    for number, file in enumerate(sorted(digit_folder.rglob("*.png"))):
        (root / f"{number:03d}.png").write_bytes(file.read_bytes())
    return root


@pytest.fixture(scope="session")
def untrained_run(tmp_path_factory) -> Path:
    """A run's folder as evaluations look at it, with first weights for a backbone and the data options of TINY."""
    import torch

    from ifnd_fast import config as configs
    from ifnd_fast.config import Config, DataConfig, ModelConfig
    from ifnd_fast.contrast.encoder import resnet

    root = tmp_path_factory.mktemp("untrained")
    config = Config(model=ModelConfig(width=8), data=DataConfig(image_size=16, workers=0))
    config.run.amp = "off"
    torch.manual_seed(0)
    (root / "config.yaml").write_text(configs.to_yaml(config))
    torch.save(resnet(config.model)[0].state_dict(), root / "backbone.pt")
    return root


@pytest.fixture(scope="session")
def class_folders(digits, tmp_path_factory) -> Path:
    """train/ and val/ with 40 and 20 PNG files for each of the digits 0 to 5, named as ImageNet names them."""
    root = tmp_path_factory.mktemp("classes")
    pixels, labels = digits
    for label in range(6):
        members = pixels[labels == label]
        for split, chosen in (("train", members[:40]), ("val", members[40:60])):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for number, image in enumerate(chosen):
                Image.fromarray(image).resize((16, 16)).save(folder / f"{folder.name}_{number}.png")
    return root


@pytest.fixture(scope="session")
def coco_folder(digits, tmp_path_factory) -> Path:
    """COCO's layout of folders, with a few digits on photographs (see tests/scenes.py)."""
    root = tmp_path_factory.mktemp("coco")
    scenes.write(root, *digits)
    return root


TINY = [
    "--epochs", "3", "--batch-size", "32", "--queue-size", "64", "--levels", "3", "6", "--image-size", "16",
    "--width", "8", "--dim", "16", "--workers", "0", "--recluster-every", "1", "--amp", "off",
]  # fmt: skip
"""Options that make a run on the folders above take a few seconds."""
