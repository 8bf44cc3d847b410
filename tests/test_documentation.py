"""The pages of the API reference, and the examples of public names."""

import importlib
import inspect
import re
import sys
import tomllib
from pathlib import Path

import pytest

import sklembed
from sklembed._display import DOCUMENTATION

ROOT = Path(__file__).parents[1]
MODULES = ["datasets", "evaluation", "metrics", "plots", "scale"]


def public_names():
    """Return the names as users write them, after ``sklembed.``."""
    names = [name for name in sklembed.__all__ if name not in MODULES]
    for module in [*MODULES, "encoders"]:
        exported = importlib.import_module(f"sklembed.{module}").__all__
        names += [f"{module}.{name}" for name in exported if name not in names]
    return names


def public_object(name):
    """Return the class or function of a public name."""
    value = sklembed
    for part in name.split("."):
        if value is sklembed and part == "encoders":
            value = importlib.import_module("sklembed.encoders")
        else:
            value = getattr(value, part)
    return value


def test_public_modules_are_listed():
    modules = [
        name for name in sklembed.__all__ if inspect.ismodule(public_object(name))
    ]
    assert sorted(modules) == MODULES


@pytest.mark.parametrize("module", ["metrics", "plots"])
def test_a_module_of_one_file_lists_its_public_names(module):
    module = importlib.import_module(f"sklembed.{module}")
    defined = []
    for name, value in vars(module).items():
        is_own = getattr(value, "__module__", None) == module.__name__
        if is_own and not name.startswith("_"):
            defined.append(name)
    assert sorted(defined) == sorted(module.__all__)


def test_the_api_page_lists_every_public_name_once_and_no_other():
    page = (ROOT / "docs" / "api.rst").read_text()
    assert page.count("currentmodule:: sklembed\n") == page.count("currentmodule::")
    listed = []
    for block in page.split(".. autosummary::")[1:]:
        entries = re.match(r"(?:\s+:.*\n|\n)+((?:   \S+\n)+)", block)
        listed += entries[1].split()
    assert sorted(listed) == sorted(public_names())


# These are results, or need a cluster: their examples are those of another function, or no test.
SHOWN_BY = {
    "evaluation.EncoderRanking": "rank_encoders",
    "evaluation.LeakReport": "leak_report",
    "evaluation.AdaptationComparison": "compare_adaptations",
    "evaluation.ModalityReport": "modality_report",
    "scale.EncodingSummary": "encode_dataset",
}
ON_A_CLUSTER = {"scale.encode_dataset"}


@pytest.mark.parametrize("name", public_names())
def test_every_public_name_has_an_example_that_runs_as_a_test(name):
    """pytest runs the examples of docstrings in the directories of `testpaths`."""
    value = public_object(name)
    if name in SHOWN_BY:
        assert SHOWN_BY[name] in value.__doc__
        return
    assert ">>> " in value.__doc__
    source = Path(sys.modules[value.__module__].__file__).relative_to(ROOT)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    settings = settings["tool"]["pytest"]["ini_options"]
    assert source.parts[0] in settings["testpaths"]
    assert "--doctest-modules" in settings["addopts"]
    assert ("doctest: +SKIP" in value.__doc__) == (name in ON_A_CLUSTER)


def test_the_address_of_the_documentation_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    addresses = {name.lower(): url for name, url in project.get("urls", {}).items()}
    assert addresses.get("documentation", DOCUMENTATION).rstrip("/") == DOCUMENTATION
