"""Every option is within the range at its field, or is refused by name; a resume minds the options that decide."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ifnd_fast.config import (
    Config,
    above,
    at_least,
    between,
    check,
    check_arguments,
    decisive,
    differences,
    may_change,
)
from ifnd_fast.config.ranges import Range, noted
from ifnd_fast.evaluate.classifier import TrainingOptions
from ifnd_fast.evaluate.cluster_images import ClusterOptions
from ifnd_fast.evaluate.detection.options import DetectionOptions
from ifnd_fast.evaluate.few_shot import FewShotOptions
from ifnd_fast.evaluate.knn import knn
from ifnd_fast.evaluate.linear import LinearOptions
from ifnd_fast.evaluate.semi import SemiOptions
from ifnd_fast.evaluate.subject import Options
from ifnd_fast.evaluate.svm import SvmOptions
from ifnd_fast.evaluate.transfer import ListOptions
from ifnd_fast.runtime.errors import UsageError

SECTIONS = [f.name for f in dataclasses.fields(Config) if f.name not in ("preset", "identity", "amp_on_cpu")]
OTHERS = [TrainingOptions, FewShotOptions, LinearOptions, SemiOptions, SvmOptions, ClusterOptions, ListOptions]
MAKERS = [*OTHERS, *(lambda kind=kind: kind(Path("run")) for kind in (Options, DetectionOptions))]


def ranges() -> list[tuple]:
    """Of every option that has one: what makes the options, the section, the name, the type and the range."""
    found = [(make, None, *field) for make in MAKERS for field in noted(type(make()))]
    found += [(Config, name, *field) for name in SECTIONS for field in noted(type(getattr(Config(), name)))]
    return [(*rest, note) for *rest, notes in found for note in notes if isinstance(note, Range)]


RANGES = ranges()


def whole(kind: object) -> bool:
    """Of integers: one, or each of a tuple's."""
    return kind is int or any(map(whole, get_args(kind)))


def inside(kind: object, allowed: Range) -> st.SearchStrategy[float]:
    low, high = (None if math.isinf(end) else end for end in (allowed.low, allowed.high))
    if whole(kind):
        return st.integers(low, high)
    numbers = st.floats(low, high, allow_nan=False, allow_infinity=False)
    return numbers.filter(lambda number: number != allowed.exclude)


def beside(kind: object, allowed: Range) -> st.SearchStrategy[float]:
    """Numbers just out of the range, and further ones."""
    low, high = allowed.low, allowed.high
    if whole(kind):
        parts = [st.just(int(low) - 1), st.integers(max_value=int(low) - 1)]
        return st.one_of(*parts, *([] if math.isinf(high) else [st.integers(min_value=int(high) + 1)]))
    parts = [st.sampled_from([math.nan, math.inf, -math.inf])]
    if allowed.exclude is not None:
        parts.append(st.just(allowed.exclude))
    if math.isfinite(low):
        parts.append(st.floats(max_value=low, exclude_max=True))
        parts.append(st.just(math.nextafter(low, -math.inf)))
    if math.isfinite(high):
        parts.append(st.floats(min_value=high, exclude_min=True))
        parts.append(st.just(math.nextafter(high, math.inf)))
    return st.one_of(*parts)


def check_with(case: tuple, number: float) -> None:
    """Check options of which this one, or the last of its numbers, is `number`."""
    make, section, name, _, _ = case
    options = make()
    part = getattr(options, section) if section else options
    default = getattr(part, name)
    setattr(part, name, (*default[1:], number) if isinstance(default, tuple) else number)
    check(options)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(RANGES).flatmap(lambda case: st.tuples(st.just(case), inside(*case[3:]))))
def test_numbers_in_the_range_pass(drawn):
    check_with(*drawn)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(RANGES).flatmap(lambda case: st.tuples(st.just(case), beside(*case[3:]))))
def test_numbers_out_of_range_are_refused_by_option_and_value(drawn):
    (*_, name, _, allowed), number = drawn
    with pytest.raises(UsageError) as refused:
        check_with(*drawn)
    message = str(refused.value)
    assert message.startswith(f"--{name.replace('_', '-')} must be {allowed}, got ") and str(number) in message


def test_every_option_that_is_a_number_has_a_range():
    kinds = [type(make()) for make in MAKERS] + [type(getattr(Config(), name)) for name in SECTIONS]
    without = {
        (kind.__name__, name)
        for kind in kinds
        for name, inner, notes in noted(kind)
        if (whole(inner) or inner is float or float in get_args(inner)) and not any(isinstance(n, Range) for n in notes)
    }
    of_a_checkpoint = {("Options", "step"), ("DetectionOptions", "step")}  # one that is there
    assert len(RANGES) > 80 and without == {("DetectionOptions", "drops")} | of_a_checkpoint


@pytest.mark.parametrize(
    "allowed, words",
    [
        (at_least(2), "2 or more"), (above(0), "a finite number above 0"), (between(0, 1), "from 0 to 1"),
        (between(0, 1, exclude=0), "from 0 (excluded) to 1"), (between(0, 1, exclude=1), "from 0 to below 1"),
        (Range(), "a finite number"), (between(1e-6, 1e6), "from 1e-06 to 1e+06"), (above(0, words="shares"), "shares"),
    ],
)  # fmt: skip
def test_what_is_wanted_in_words(allowed, words):
    assert str(allowed) == words


@pytest.mark.parametrize("number", [10**400, -(10**400)], ids=["large", "negative"])
def test_integers_too_large_for_a_float_are_refused_too(number):
    for allowed in (at_least(1), between(0, 2**62), Range()):
        assert number not in allowed
    with pytest.raises(UsageError, match="--epochs must be 1 or more, got -?1000"):
        check(TrainingOptions(epochs=number))


def test_none_stands_in_for_options_that_have_it_in_their_type():
    check(ClusterOptions(levels=None, confidence_temperature=None))
    with pytest.raises(UsageError, match="--seed must be from 0 to 4.6.*, got None"):
        check(ClusterOptions(seed=None))


@pytest.mark.parametrize(
    "options, message",
    [
        (SemiOptions(shares=()), r"--shares must be from 0 \(excluded\) to 1, got \(\)"),
        (SvmOptions(costs=()), r"--costs must be finite numbers above 0, got \(\)"),
        (DetectionOptions(Path("run"), min_size=()), r"--min-size must be one or more sides .* pixels, got \(\)"),
        (TrainingOptions(drops=(0.5, 60)), r"--drops must be shares of the epochs, from 0 to 1, got \(0.5, 60\)"),
        (SvmOptions(shots=(1, 0)), "--shots must be 1 or more, got 0"),
    ],
)
def test_options_of_several_numbers(options, message):
    with pytest.raises(UsageError, match=message):
        check(options)


def test_options_that_may_be_no_numbers_at_all():
    check(TrainingOptions(drops=()))
    check(SvmOptions(shots=()))


def test_options_that_are_arguments():
    check_arguments(knn, k=1, temperature=1e-6)
    for wrong, message in (({"k": 0}, "--k must be 1 or more, got 0"), ({"temperature": 0.0}, "--temperature must be")):
        with pytest.raises(UsageError, match=message):
            check_arguments(knn, **wrong)


def test_a_resumed_run_may_differ_in_what_changes_nothing_that_is_computed():
    assert may_change(Config) == {
        "identity", "resume", "out", "device", "workers", "data_root", "knn_every", "checkpoint_every",
        "keep_checkpoints", "rank_timeout", "tensorboard", "wandb", "mlflow", "cache", "cache_limit",
    }  # fmt: skip


def test_what_decides_a_training_is_plain_and_without_what_may_change():
    assert decisive(DetectionOptions(Path("run"), iterations=9, min_size=(64, 80))) == {
        "batch_size": 16, "iterations": 9, "lr": None, "warmup": None, "drops": None, "sgd_momentum": 0.9,
        "weight_decay": 1e-4, "batch_norm": "auto", "min_size": [64, 80], "max_size": 1333, "amp": "off", "seed": 0,
    }  # fmt: skip
    assert decisive(LinearOptions(lr=1.0, out=Path("out")), TrainingOptions) == {
        "epochs": 100, "batch_size": 256, "drops": [0.6, 0.8], "drop_factor": 0.1, "sgd_momentum": 0.9,
        "weight_decay": 0.0, "crop_min": None, "flip": None, "seed": 0,
    }  # fmt: skip
    found = decisive(Config())
    assert found["levels"] == [10, 20, 40] and found["preset"] == "demo" and not may_change(Config) & set(found)


def test_differences_of_where_the_data_lie_count_only_while_they_are_not_known():
    saved, wanted = Config(), Config(preset="cifar10")
    wanted.data.data = "cifar10"
    assert differences(saved, wanted) == [
        "preset: the run has demo, asked for cifar10", "--data: the run has demo, asked for cifar10",
    ]  # fmt: skip
    saved.identity = {"train": "a"}
    assert differences(saved, wanted) == ["preset: the run has demo, asked for cifar10"]
