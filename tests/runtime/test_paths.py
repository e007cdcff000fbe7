"""Paths as people type them: home folders, relative ones, outputs that can't be."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from ifnd_fast import config as configs
from ifnd_fast.cli import evaluate, parse_train
from ifnd_fast.runtime.errors import CommandError, UsageError
from ifnd_fast.runtime.paths import expand_home, refuse_file, refuse_folder
from tests.conftest import TINY
from tests.forked import command


@pytest.mark.parametrize(
    "args, expanded",
    [
        (["--out=~/x", "--out", "~/x", "~", "--data=~"], ["--out=/h/x", "--out", "/h/x", "/h", "--data=/h"]),
        (["knn", "~/run", "--json-file=~/k.json"], ["knn", "/h/run", "--json-file=/h/k.json"]),
        (["--plot=~/a b~.png", "--image_root=~/é"], ["--plot=/h/a b~.png", "--image_root=/h/é"]),
        (["a~/x", "--lr=0.1", "--", "-1", "./~/x", "--x=a=~"], ["a~/x", "--lr=0.1", "--", "-1", "./~/x", "--x=a=~"]),
    ],
)
def test_home_folders_in_any_form(args, expanded, monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    assert expand_home(args) == expanded


def test_without_home_the_system_knows_it_or_it_is_an_error(monkeypatch, tmp_path):
    import pwd

    monkeypatch.delenv("HOME")
    assert expand_home(["--out=~/x"]) == [f"--out={pwd.getpwuid(os.getuid()).pw_dir}/x"]
    monkeypatch.setattr(pwd, "getpwuid", lambda _: (_ for _ in ()).throw(KeyError("no such user")))
    with pytest.raises(UsageError, match="--out=~/x: no home folder ~ is known"):
        expand_home(["--out=~/x"])
    for home in ("", "relative"):
        monkeypatch.setenv("HOME", home)
        with pytest.raises(UsageError, match="no full path"):
            expand_home(["--out=~/x"])
    with pytest.raises(UsageError, match="~no-such-user"):
        expand_home(["--data", "~no-such-user/images"])
    monkeypatch.chdir(tmp_path)
    Path("~odd").mkdir()
    assert expand_home(["~odd"]) == ["~odd"]  # a file is what it is called


def test_every_path_that_is_stored_is_whole(digit_folder, tmp_path, monkeypatch):
    (tmp_path / "images").symlink_to(digit_folder)
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    monkeypatch.setenv("HOME", str(tmp_path))
    for data in ("../images", "../images/", f"{tmp_path}/in/../images"):
        config = parse_train(["--data", data, "--out=~/run", "--data-root", "down"])
        assert Path(config.data.data) == digit_folder  # .. is of where links lead
        assert (config.run.out, config.data.data_root) == (tmp_path / "run", tmp_path / "in" / "down")
    assert parse_train(["--data=~/images"]).data.data == str(tmp_path / "images")
    assert parse_train(["--data", "./demo"]).data.data == str(tmp_path / "in" / "demo")
    assert parse_train(["--data", "demo"]).data.data == "demo" and parse_train(["--data", ""]).data.data == ""
    text = configs.to_yaml(parse_train(["--data=~/images"]))
    assert f"data: {tmp_path}/images" in text


def test_outputs_that_cannot_be_written_are_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").symlink_to(tmp_path / "gone")
    for path in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(CommandError, match="--out .*file is a file, it must be a folder"):
            refuse_file("--out", path)
        with pytest.raises(CommandError, match="--out"):
            parse_train(["--out", str(path)])
    with pytest.raises(CommandError, match="broken is a broken link"):
        refuse_file("--out", tmp_path / "broken" / "x")
    with pytest.raises(CommandError, match="is a folder: give the name of a file"):
        refuse_folder("--json-file", tmp_path)
    refuse_file("--out", tmp_path / "new" / "and" / "deep")
    refuse_folder("--plot", tmp_path / "new" / "plot.png")
    assert not (tmp_path / "new").exists()


def test_a_run_with_home_paths_inside_its_data(class_folders, tmp_path, monkeypatch):
    """The run lies in a new folder of the data folder, also with pictures in it; resumed it is the same."""
    shutil.copytree(class_folders / "train", tmp_path / "images")
    monkeypatch.setenv("HOME", str(tmp_path))
    options = [option if option != "3" else "1" for option in TINY[:2]] + TINY[2:]
    done = command("train", "--data=~/images", "--out=~/images/runs/deep/x", *options)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "images" / "runs" / "deep" / "x"
    (out / "evaluate").mkdir()
    shutil.copy(next((tmp_path / "images").rglob("*.png")), out / "evaluate" / "curves.png")
    assert json.loads((out / "result.json").read_text())["knn_top1"] > 0
    assert not (tmp_path / "~").exists() and not Path("~").exists()
    done = command("train", "--resume", "--out=~/images/runs/deep/x")
    assert done.returncode == 0, done.stderr
    assert "240 training images in 6 classes" in done.stdout
    monkeypatch.setattr("sys.argv", ["ifnd-fast-eval", "knn", "~/images/runs/deep/x", "--json-file=~/new/knn.json"])
    evaluate()
    figures = json.loads((tmp_path / "new" / "knn.json").read_text())
    assert (figures["checkpoint"], figures["data"]) == (str(out), str(tmp_path / "images"))


@pytest.mark.parametrize("args", [["--json-file", "."], ["--json-file", "file/x.json"]])
def test_evaluations_refuse_such_outputs_too(args, untrained_run, tmp_path, monkeypatch):
    from ifnd_fast.evaluate.subject import Options, Subject

    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(CommandError, match="--json-file"):
        Subject(Options(untrained_run, json_file=Path(args[1])))
