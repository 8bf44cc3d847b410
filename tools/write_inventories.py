"""Write the inventories by which the documentation links to other projects.

Sphinx reads a project's inventory from the project's website. The documentation is also built
without a network, so the repository contains inventories. They list the public names of the
installed packages, each with its page, by the rule by which the website names its pages. Run
this script after an update of a package::

    python tools/write_inventories.py
"""

import importlib
import inspect
import pkgutil
import zlib
from importlib.metadata import version
from pathlib import Path

from sklearn.experimental import (  # noqa: F401
    enable_halving_search_cv,
    enable_iterative_imputer,
)

DIRECTORY = Path(__file__).parents[1] / "docs" / "_inventories"

# The page of a public name of each package.
PAGES = {
    "matplotlib": "api/_as_gen/{name}.html",
    "numpy": "reference/generated/{name}.html",
    "pandas": "reference/api/{name}.html",
    "sklearn": "modules/generated/{name}.html",
    "skorch": "{module}.html",
    "skrub": "reference/generated/{name}.html",
    "torch": "generated/{name}.html",
}
MODULES = {
    "matplotlib": ["matplotlib.pyplot"],
    "numpy": ["numpy"],
    "pandas": ["pandas"],
    "skorch": ["skorch"],
    "torch": ["torch", "torch.nn", "torch.optim"],
}
# Public modules within public modules.
SUBMODULES = {"sklearn": ["sklearn.metrics.pairwise", "sklearn.utils.metadata_routing"]}
# Packages whose methods are listed; in pandas each has a page of its own.
METHODS = {"pandas", "sklearn", "skrub"}
METHOD_PAGES = {"pandas"}
# Packages whose classes are not on pages of this rule.
FUNCTIONS_ONLY = {"matplotlib", "numpy"}
# scikit-learn renames a page that differs from another only in case.
RENAMED = {"sklearn.cluster.dbscan", "sklearn.covariance.oas"}
RENAMED.add("sklearn.decomposition.fastica")
# Labels and terms in docstrings that estimators inherit from scikit-learn.
LABELS = {
    "accuracy_score": "modules/model_evaluation.html#accuracy-score",
    "df_output_transform": "modules/df_output_transform.html",
    "metadata_routing": "metadata_routing.html",
    "r2_score": "modules/model_evaluation.html#r2-score",
    "sphx_glr_auto_examples_miscellaneous_plot_set_output.py": (
        "auto_examples/miscellaneous/plot_set_output.html"
    ),
}
TERMS = ["transform"]


def public_modules(package):
    """Return the public modules of a package, in the order of their names."""
    if package in MODULES:
        return MODULES[package]
    root = importlib.import_module(package)
    names = [package, *SUBMODULES.get(package, [])]
    for module in pkgutil.iter_modules(root.__path__, f"{package}."):
        if not module.name.rpartition(".")[2].startswith(("_", "conftest", "tests")):
            names.append(module.name)
    return names


def public_objects(package):
    """Yield the public classes and functions of a package, with their names."""
    for module_name in public_modules(package):
        module = importlib.import_module(module_name)
        for name in getattr(module, "__all__", dir(module)):
            value = getattr(module, name, None)
            if name.startswith("_") or not callable(value):
                continue
            if package in FUNCTIONS_ONLY and inspect.isclass(value):
                continue
            defined_in = getattr(value, "__module__", None) or module_name
            if defined_in.split(".")[0] == package:
                yield f"{module_name}.{name}", value


def entries(package):
    """Yield the lines of an inventory: name, type, priority, page and title."""
    for name, value in public_objects(package):
        anchor = name
        if package == "skorch":  # documented where they are defined
            anchor = f"{value.__module__}.{value.__name__}"
        module = anchor.split(".")[-2]
        page = PAGES[package].format(name=name, module=module)
        if name in RENAMED:
            page = page.replace(".html", "-function.html")
        kind = "class" if inspect.isclass(value) else "function"
        yield f"{name} py:{kind} 1 {page}#{anchor} -"
        if kind == "function" or package not in METHODS:
            continue
        for method, function in inspect.getmembers(value, callable):
            if method.startswith("_") or not hasattr(function, "__qualname__"):
                continue
            if package in METHOD_PAGES:
                page = PAGES[package].format(name=f"{name}.{method}")
            yield f"{name}.{method} py:method 1 {page}#{anchor}.{method} -"
    if package == "sklearn":
        # The name that Sphinx finds in annotations.
        page = PAGES[package].format(name="sklearn.utils.Bunch")
        yield f"sklearn.utils._bunch.Bunch py:class 1 {page}#sklearn.utils.Bunch -"
        for label, page in LABELS.items():
            yield f"{label} std:label -1 {page} {label}"
        for term in TERMS:
            yield f"{term} std:term -1 glossary.html#term-{term} -"


def write_inventory(package):
    """Write the inventory of a package in the second version of Sphinx's format."""
    distribution = {"sklearn": "scikit-learn"}.get(package, package)
    header = (
        "# Sphinx inventory version 2\n"
        f"# Project: {package}\n"
        f"# Version: {version(distribution)}\n"
        "# The remainder of this file is compressed using zlib.\n"
    )
    lines = sorted(set(entries(package)))
    body = zlib.compress("".join(f"{line}\n" for line in lines).encode(), 9)
    path = DIRECTORY / f"{package}.inv"
    path.write_bytes(header.encode() + body)
    print(f"{path.name}: {len(lines)} names, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    DIRECTORY.mkdir(exist_ok=True)
    for package in PAGES:
        write_inventory(package)
