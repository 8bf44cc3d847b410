"""What importing costs, and that the public names are where they are said to be."""

import subprocess
import sys

import pytest

import sklembed


def imported_by(statement):
    """List the modules that a statement brings into a fresh interpreter."""
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(out.stdout.split())


def test_importing_the_package_brings_in_nothing_else():
    modules = imported_by("import sklembed")
    assert not modules & {"torch", "sklearn", "numpy", "pandas", "transformers", "skorch"}


@pytest.mark.parametrize("name", sklembed.__all__)
def test_no_public_name_imports_torch_or_transformers(name):
    modules = imported_by(f"from sklembed import {name}")
    assert not modules & {"torch", "transformers", "skorch", "xgboost", "matplotlib"}


@pytest.mark.parametrize("name", sklembed.__all__)
def test_public_names_are_found_and_documented(name):
    assert getattr(sklembed, name).__doc__
    assert name in dir(sklembed)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sklembed.nothing


def test_the_package_is_typed():
    from importlib.resources import files

    assert (files("sklembed") / "py.typed").is_file()
