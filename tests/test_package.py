"""Versions and requirements are the same in all files that state them."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import sklembed

ROOT = Path(__file__).parents[1]
IN_CONDA = {"torch": "pytorch", "huggingface-hub": "huggingface_hub"}

if not (ROOT / "pyproject.toml").exists():
    pytest.skip("an installed package has no sources", allow_module_level=True)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]


def read_yaml(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def floors():
    """Return the least version of each dependency."""
    versions = {}
    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        (specifier,) = requirement.specifier
        assert specifier.operator == ">="
        versions[requirement.name] = Version(specifier.version)
    return versions


def test_the_oldest_versions_are_tested():
    """`make test-oldest` installs the floors. Of torch there is one build for all."""
    text = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", text, flags=re.MULTILINE))
    tested = {name.replace("_", "-"): Version(pin) for name, pin in pins.items()}
    for name, floor in floors().items():
        assert tested[name] == floor or name == "torch", name


def test_the_recipe_has_the_requirements_of_the_package():
    recipe = read_yaml("recipe/recipe.yaml")
    python, *others = recipe["requirements"]["run"]
    assert python == "python >=${{ python_min }}"
    expected = {IN_CONDA.get(name, name): floor for name, floor in floors().items()}
    stated = {}
    for requirement in others:
        name, _, version = requirement.partition(" >=")
        stated[name] = Version(version)
    assert stated == expected
    (python_min,) = read_yaml("recipe/variants.yaml")["python_min"]
    assert PROJECT["requires-python"] == f">={python_min}"
    assert set(recipe["about"]["license_file"]) == set(PROJECT["license-files"])


def test_the_version_is_the_same_in_all_files():
    assert read_yaml("recipe/recipe.yaml")["context"]["version"] == sklembed.__version__
    assert read_yaml("CITATION.cff")["version"] == sklembed.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    latest = re.search(r"^## ([^\s,]+)", changelog, flags=re.MULTILINE)
    assert latest[1] == sklembed.__version__
