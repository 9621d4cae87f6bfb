"""The examples in the docstrings of the public names."""

import doctest
import inspect
import sys

import pytest

import fastalign

PACKAGES = ("data.preferences", "data.prompts", "decode", "losses", "ops", "palette", "rewards", "soup")


def with_examples():
    """The modules of each package's public names."""
    for package in PACKAGES:
        home = fastalign
        for part in package.split("."):
            home = getattr(home, part)
        public = [getattr(home, name) for name in getattr(home, "__all__", vars(home))]
        found = {one.__module__ for one in public if inspect.isfunction(one) or inspect.isclass(one)}
        yield from sorted(name for name in found if name.startswith("fastalign."))


@pytest.mark.parametrize("name", sorted({*with_examples()}))
def test_examples_do_what_they_say(name):
    result = doctest.testmod(sys.modules[name], optionflags=doctest.NORMALIZE_WHITESPACE)
    assert not result.failed


def test_there_are_many():
    finder = doctest.DocTestFinder(exclude_empty=True)
    assert sum(len(test.examples) > 0 for name in {*with_examples()} for test in finder.find(sys.modules[name])) > 30
