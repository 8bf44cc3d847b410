"""What importing costs, and that the public names are where they are said to be."""

import os
import subprocess
import sys

import pytest

import sklembed


def imported_by(statement):
    """List the modules that a statement brings into a fresh interpreter."""
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    return set(out.stdout.split())


def test_importing_the_package_brings_in_nothing_else():
    modules = imported_by("import sklembed")
    assert not modules & {
        "torch",
        "sklearn",
        "numpy",
        "pandas",
        "transformers",
        "skorch",
    }


HEAVY = {"torch", "transformers", "skorch", "xgboost", "matplotlib"}
# Each name is imported in a fork of its own, which starts with the light dependencies loaded.
IMPORT_EACH_NAME = f"""
import os, sys
import numpy, pandas, scipy.optimize, sklearn.ensemble, sklearn.compose, sklearn.decomposition
import sklembed

assert not {HEAVY} & set(sys.modules)
for name in sklembed.__all__:
    if not os.fork():
        getattr(sklembed, name)
        print(name, *({HEAVY} & set(sys.modules)), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_no_public_name_imports_torch_or_transformers():
    out = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH_NAME],
        check=True,
        capture_output=True,
        text=True,
    )
    assert sorted(out.stdout.split("\n")) == sorted(["", *sklembed.__all__])


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
