"""Lists: what is accepted, and mistakes that are named with their place."""

import pytest
import yaml

from mambascope.commands.compare import main
from mambascope.compare.lists import Comparison, Setting, merged, read_list, shipped_lists
from mambascope.utils import flat
from tests.compare.common import comparison


@pytest.fixture
def write(tmp_path):
    return lambda **changes: comparison(tmp_path, **changes)


def plain(**entries):
    """A list without trainings."""
    net = {"checkpoint": "a.safetensors"}
    return Comparison("t", {"vim": {"label": "Vim", "net": net}, **entries}, "vim", data={"class_path": "x"})


def test_a_list_is_read(write):
    plan = read_list(str(write()))
    assert list(plan.entries) == ["vim", "scope", "longer", "deit"]
    assert plan.entries["vim"].settings == (Setting(), Setting(data={"img_size": 16}))
    assert [s.label for s in plan.entries["vim"].settings] == ["as trained", "img_size 16"]
    assert plan.entries["scope"].thresholds == (0.13, 0.16)
    assert plan.chain("longer") == ("vim", "longer")


def test_restricting_keeps_what_is_needed(write):
    plan = read_list(str(write()))
    some = plan.restricted(["longer"], [3, 3, 1])
    assert (list(some.entries), some.curve, some.seeds) == (["vim", "longer"], None, (3, 1))
    assert plan.restricted(["scope"], None).curve == "scope"
    assert [len(entry.settings) for entry in plan.restricted(["longer"], None).entries.values()] == [2, 1]
    with pytest.raises(ValueError, match="an entry must be one of vim, scope, longer, deit, got 'resnet'"):
        plan.restricted(["resnet"], None)


def test_mappings_are_merged_and_everything_else_replaced():
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 3}
    assert merged(base, {"a": {"c": [4]}}, {"d": {"e": 5}}) == {"a": {"b": 1, "c": [4]}, "d": {"e": 5}}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 3}
    assert flat({"a": {"b": {"c": 1}}, "d": {}}) == {"a.b.c": 1, "d": {}}
    assert Setting(model={"reduction": {"name": "mtr", "r": 8}}).label == "name mtr, r 8"


@pytest.mark.parametrize("name", shipped_lists())
def test_shipped_lists_are_valid(name):
    assert read_list(name).entries


ENTRY = {"label": "a", "config": "vim_tiny_imagenet"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entry": {}}, "list tiny.yaml has no option entry; it accepts title, entries, baseline, "),
        (
            {"baseline": "vit"},
            "tiny.yaml: baseline must be one of the entries vim, scope, longer, deit, got 'vit'",
        ),
        ({"seeds": [-1]}, "seeds must be a list of integers >= 0, got [-1]"),
        ({"entries": {"vim": {"config": "vim_tiny_imagenet"}}}, "entries.vim needs label"),
        ({"entries": {"vim": {**ENTRY, "cofig": 1}}}, "entries.vim has no option cofig; it accepts label, config"),
        ({"entries": {"vim": {**ENTRY, "config": "vit"}}}, "entries.vim: config 'vit' does not exist; the package has"),
        ({"entries": {"vim": {**ENTRY, "start": "vit"}}}, "entries.vim.start must be one of"),
        ({"entries": {"vim": {**ENTRY, "start": "vim"}}}, "entries.vim.start must not lead back to itself: vim <- vim"),
        (
            {"entries": {"vim": {"label": "a"}}},
            "the source of the weights must be config, config with start, start",
        ),
        (
            {"entries": {"vim": {"label": "a", "net": {"file": "a"}}}},
            "net must be a mapping with name, args, check",
        ),
        ({"entries": {"vim": {"label": "a", "net": {"name": "a"}}}}, "entries.vim is not trained here: the list needs"),
        (
            {"entries": {"vim": {**ENTRY, "thresholds": [0, 2]}}},
            "thresholds must be numbers between 0 and 1, got",
        ),
        ({"entries": {"vim": {**ENTRY, "settings": [{"data": 3}]}}}, "settings[0]: data must be a mapping, got 3"),
        ({"entries": {"vim": {**ENTRY, "settings": [{}, {}]}}}, "labels of settings must be different"),
        (
            {"entries": {"vim": {"label": "a", "start": "b", "settings": [{"training": {"a": 1}}]}}},
            "entries.vim: training must be left out where nothing is trained, got {'a': 1}",
        ),
        (
            {"entries": {"vim": {**ENTRY, "settings": [{"cells": "best"}]}}},
            "cells must be one of 'important', 'random'",
        ),
        ({"entries": {"vim": {**ENTRY, "table": "worst"}}}, "table must be one of 'best', 'gain', got 'worst'"),
        ({"image_sets": 3}, "image_sets must be true or false, got 3"),
        ({"entries": {"a b": ENTRY}}, "the name of an entry must be letters, digits, - and _, got 'a b'"),
        ({"timing": {"batch_sizes": [0]}}, "timing: batch_sizes must be a list of integers >= 1, got [0]"),
        ({"timing": {"round": 1}}, "timing has no option round; it accepts batch_sizes, images, rounds, max_seconds"),
        ({"published": ["huge"]}, "published must be a list of base, small, tiny, got ['huge']"),
    ],
)
def test_mistakes_are_named_in_one_line(changes, message, write, capsys):
    changes = {"baseline": "vim", "curve": None, **changes} if "entries" in changes else changes
    assert main([str(write(**changes)), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_files_that_are_no_lists(tmp_path, capsys):
    (tmp_path / "text.yaml").write_text("just words")
    (tmp_path / "broken.yaml").write_text("a: [1")
    for name, message in (
        ("text.yaml", "list text.yaml must be a mapping of title"),
        ("broken.yaml", "is not YAML"),
        ("none.yaml", "none.yaml' does not exist; the package has"),
    ):
        assert main([str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_circle_of_entries_is_refused():
    two = {"a": {"label": "a", "start": "b"}, "b": {"label": "b", "start": "a"}}
    with pytest.raises(ValueError, match=r"entries\.a\.start must not lead back to itself: a <- b <- a"):
        plain(**two)


def test_yaml_of_the_shipped_lists_says_what_it_is():
    for path in shipped_lists().values():
        assert path.read_text().startswith("# ")
        assert yaml.safe_load(path.read_text())["title"]
