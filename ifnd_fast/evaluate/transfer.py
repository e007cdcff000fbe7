"""ifnd-fast-eval transfer: a linear classifier on frozen features, on another data set than the pre-training's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from ifnd_fast.data.found import tell_found
from ifnd_fast.data.images import ListImages
from ifnd_fast.evaluate.labelled import matched, open_labelled
from ifnd_fast.evaluate.linear import LinearOptions, measure
from ifnd_fast.evaluate.subject import Options, Subject
from ifnd_fast.runtime.errors import UsageError


@dataclass
class ListOptions:
    """Images by lists, as Places205 has them, in place of --data."""

    train_list: Path | None = None
    """file with a line "path class" for each training image, classes from 0 on (train_places205.csv)"""
    val_list: Path | None = None
    """the same for the images to test on (val_places205.csv)"""
    image_root: Path | None = None
    """folder that the lists' paths count from; default: that of --train-list"""


def transfer(
    common: tyro.conf.OmitArgPrefixes[Options],
    lists: tyro.conf.OmitArgPrefixes[ListOptions],
    training: tyro.conf.OmitArgPrefixes[LinearOptions],
) -> None:
    """Accuracy of a linear classifier on frozen features of another data set (Places205, say)."""
    training.check()
    if (lists.train_list is None) != (lists.val_list is None):
        raise UsageError("--train-list and --val-list go together: give both")
    if (lists.train_list is None) == (common.data is None):
        raise UsageError("give the data to transfer to: either --data, or --train-list and --val-list")
    subject = Subject(common)
    if lists.train_list is None or lists.val_list is None:
        train, test = open_labelled(subject.data)
    else:
        root = lists.image_root or lists.train_list.parent
        train, test = ListImages(lists.train_list, root), ListImages(lists.val_list, root)
        subject.data.data = lists.train_list.stem
        tell_found(subject.data, train, test)
        test = matched(f"--train-list {lists.train_list}, --val-list {lists.val_list}", train, test)
    measure(subject, train, test, training, "transfer")
