"""Checkpoints are whole or refused."""

from __future__ import annotations

import pickle
import threading

import pytest
import torch

from ifnd_fast.runtime import checkpoint
from ifnd_fast.runtime.errors import CommandError


def state(step: int) -> dict:
    return {"step": step, "weights": torch.full((1000,), float(step)), "names": ["a"]}


def test_save_load_and_prune(tmp_path):
    for step in (5, 10, 100):
        checkpoint.save(tmp_path, state(step), keep=2)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == [
        "step-000000010.pt", "step-000000100.pt",
    ]  # fmt: skip
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded["step"] == 100 and torch.equal(loaded["weights"], state(100)["weights"])


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"hello" * 50])
def test_a_broken_checkpoint_is_named_and_the_one_before_used(damage, tmp_path):
    checkpoint.save(tmp_path, state(1))
    newest = checkpoint.save(tmp_path, state(2))
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.raises(CommandError, match=newest.name):
        checkpoint.load(newest)
    with pytest.warns(UserWarning, match=newest.name):
        assert checkpoint.load_latest(tmp_path)["step"] == 1


def test_a_flipped_bit_is_found(tmp_path):
    path = checkpoint.save(tmp_path, state(1))
    whole = path.read_bytes()
    values = whole.index(torch.full((1000,), 1.0).numpy().tobytes())
    for at in (values, values + 2000):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        assert not torch.equal(torch.load(path)["weights"], state(1)["weights"])  # torch itself doesn't mind
        with pytest.raises(CommandError, match="is damaged"):
            checkpoint.load(path)


def test_a_run_goes_on_while_its_checkpoints_are_read(tmp_path, recwarn):
    """With one kept, what was listed is gone as soon as the next is written."""
    stop = threading.Event()

    def write():
        step = 1
        while not stop.is_set():
            checkpoint.save(tmp_path, state(step), keep=1)
            step += 1

    checkpoint.save(tmp_path, state(0))
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(50):
            found = checkpoint.load_latest(tmp_path)
            assert torch.equal(found["weights"], state(found["step"])["weights"])
    finally:
        stop.set()
        writer.join()
    assert found["step"] > 0 and not recwarn.list


def test_one_that_is_deleted_before_it_is_opened_is_replaced_by_a_newer_one(tmp_path, monkeypatch, recwarn):
    first, load = checkpoint.save(tmp_path, state(1)), checkpoint.load

    def late(path):
        if path == first:
            checkpoint.save(tmp_path, state(2), keep=1)
        return load(path)

    monkeypatch.setattr(checkpoint, "load", late)
    assert checkpoint.load_latest(tmp_path)["step"] == 2 and not first.exists() and not recwarn.list


def test_one_that_is_deleted_while_it_is_read_is_read_whole(tmp_path, monkeypatch):
    path, load = checkpoint.save(tmp_path, state(1)), torch.load

    def late(file, **options):
        path.unlink()
        return load(file, **options)

    monkeypatch.setattr(torch, "load", late)
    assert torch.equal(checkpoint.load(path)["weights"], state(1)["weights"]) and not path.exists()


def test_what_a_killed_writer_left_is_removed(tmp_path):
    kept = checkpoint.save(tmp_path, state(1))
    left = [tmp_path / ".backbone.pt.tmp", kept.with_name(".step-000000002.pt.tmp")]
    for path in left:
        path.write_bytes(b"half")
    checkpoint.remove_temporaries(tmp_path)
    assert not any(path.exists() for path in left) and checkpoint.load(kept)["step"] == 1


def test_a_foreign_file_is_refused(tmp_path):
    path = checkpoint.folder(tmp_path) / "step-000000001.pt"
    path.parent.mkdir()
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CommandError, match="not a checkpoint"):
        checkpoint.load(path)


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_checkpoint_never_runs_code(tmp_path):
    canary = tmp_path / "ran"
    path = tmp_path / "evil.pt"
    torch.save({"format": checkpoint.FORMAT, "evil": Malice(str(canary))}, path)
    with pytest.raises(CommandError):
        checkpoint.load(path)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Malice(str(canary)))).close()
    assert canary.exists(), "the payload of this test would not have run anyway"


def test_nothing_there(tmp_path):
    with pytest.raises(CommandError, match="no checkpoint"):
        checkpoint.load_latest(tmp_path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    checkpoint.write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CommandError, match="No space left"):
        checkpoint.write_atomically(path, fail)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]
