"""The examples in docstrings give what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ifnd_fast

NAMES = {"torch": torch, **{name: getattr(ifnd_fast, name) for name in ifnd_fast.__all__}}
"""What an example may use besides its module's own names."""


def with_examples() -> Iterator[str]:
    """The modules, of all rooms, in which there is an example."""
    for package in pkgutil.walk_packages(ifnd_fast.__path__, "ifnd_fast."):
        spec = package.module_finder.find_spec(package.name, None)
        if spec and spec.origin and spec.origin.endswith(".py") and ">>> " in Path(spec.origin).read_text():
            yield package.name


def examples_of(module: str) -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = finder.find(importlib.import_module(module), extraglobs=NAMES)
    return [test for test in tests if test.examples]


@pytest.mark.parametrize("module", sorted(with_examples()))
def test_examples(module, capsys):
    tests, runner = examples_of(module), doctest.DocTestRunner()
    assert tests
    for test in tests:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", ifnd_fast.__all__)
def test_every_public_name_has_an_example(name):
    public = getattr(ifnd_fast, name)
    found = {test.name for test in examples_of(public.__module__)}
    assert f"{public.__module__}.{public.__name__}" in found
