"""Sphinx configuration."""

import json
import os
import re
import sys
import warnings
from pathlib import Path

import pandas as pd
from sphinx_gallery.sorting import ExplicitOrder

import sklembed

sys.path.insert(0, str(Path(__file__).with_name("_extensions")))

project = "sklembed"
copyright = "2026, the sklembed developers"
version = release = sklembed.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "numpydoc",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "sphinx-mathjax-offline",  # mathematics without network
    "llms",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "binder"]
html_css_files = ["figures.css"]
html_static_path = ["_static"]
html_search_scorer = str(Path(__file__).with_name("_static") / "scorer.js")
html_theme = "pydata_sphinx_theme"
html_title = "sklembed"
html_theme_options = {
    "navbar_end": ["theme-switcher"],
    "show_toc_level": 2,
    "show_prev_next": False,
    # Examples have no table of contents: their code needs the width.
    "secondary_sidebar_items": dict.fromkeys(
        ("*", "api/*", "development/*", "results/*", "user_guide/*"), ["page-toc"]
    ),
}
html_show_sourcelink = False
# These pages have no pages below them to list on the left.
html_sidebars = dict.fromkeys(
    ("changelog", "choose", "coming_from", "faq", "glossary", "install", "tutorial"), []
)

autosummary_generate = True
numpydoc_show_class_members = False  # the templates list the methods
toc_object_entries_show_parents = "hide"
numpydoc_validation_checks = {
    "GL01",
    "GL03",
    "GL08",
    "PR01",
    "PR02",
    "PR03",
    "RT01",
    "SS03",
}
numpydoc_validation_exclude = {
    # documented by scikit-learn
    r"\.set_\w+_request$",
    r"\.set_output$",
    r"\.get_params$",
    r"\.set_params$",
    r"\.get_metadata_routing$",
    r"\.get_feature_names_out$",
    r"\.fit_transform$",
}

# Links to other projects. Their inventories are in the repository, so that the documentation is
# built without a network; tools/write_inventories.py writes them.
PROJECTS = {
    "matplotlib": "https://matplotlib.org/stable/",
    "numpy": "https://numpy.org/doc/stable/",
    "pandas": "https://pandas.pydata.org/docs/",
    "sklearn": "https://scikit-learn.org/stable/",
    "skorch": "https://skorch.readthedocs.io/en/stable/",
    "skrub": "https://skrub-data.org/stable/",
    "torch": "https://docs.pytorch.org/docs/stable/",
}
intersphinx_mapping = {
    name: (url, f"_inventories/{name}.inv") for name, url in PROJECTS.items()
}
nitpicky = True  # a link that leads nowhere is an error

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "within_subsection_order": ExplicitOrder(
        [
            f"plot_{name}.py"
            for name in (
                "quickstart",
                "regression",
                "several_labels",
                "missing_modalities",
                "grid_search",
                "calibration",
                "leaks",
                "modality_value",
                "rank_encoders",
                "adaptations",
                "explain",
                "few_labels",
                "cross_fitting",
                "paper_preset",
                "modality_gap",
                "crossmodal_search",
                "zero_shot",
                "segmentation",
                "skrub",
                "save_and_serve",
            )
        ]
    ),
    "filename_pattern": r"plot_",
    "ignore_pattern": r"benchmarks",
    "doc_module": "sklembed",
    "backreferences_dir": "api/backreferences",
    "remove_config_comments": True,
    "abort_on_example_error": True,
    "show_memory": False,
    "parallel": True,  # as many examples at a time as sphinx-build -j sets
    "show_signature": False,
    "capture_repr": (),
}
# Each example gets a link that opens it in Binder, if the repository of the built site is known.
# JupyterLite is not used, because torch does not run in a browser.
if site := os.environ.get("SKLEMBED_SITE"):  # "owner/repository"
    owner, repository = site.split("/")
    sphinx_gallery_conf["binder"] = {
        "org": owner,
        "repo": repository,
        "branch": "gh-pages",
        "binderhub_url": "https://mybinder.org",
        "dependencies": ["binder/requirements.txt", "binder/runtime.txt"],
        "use_jupyter_lab": True,
    }
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore", category=DeprecationWarning)
# joblib replaces a worker whose memory grows by the import of torch.
warnings.filterwarnings("ignore", message="A worker stopped while some jobs")


def read_benchmark(name, measure=None):
    """Read the records or verdicts of a benchmark as a table, or one measure by run."""
    result = json.loads(
        Path(__file__).with_name("benchmarks").joinpath(f"{name}.json").read_text()
    )
    if measure in result:
        return pd.DataFrame(result[measure])
    if measure is not None:
        table = pd.DataFrame(result["records"])
        table = table.pivot_table(measure, "arm", "run", aggfunc="median", sort=False)
        return table.rename_axis(index="", columns=None).reset_index()
    if "records" in result:
        return pd.DataFrame(result["records"])
    return pd.DataFrame({"": result.keys(), "figure": result.values()})


def as_csv_table(table, digits):
    """Format a table as reST, without empty columns."""
    table = table.loc[:, (table.notna() & (table != "")).any()]
    header, *rows = table.to_csv(index=False, float_format=f"%.{digits}f").splitlines()
    lines = [".. csv-table::", "   :class: figures", f"   :header: {header}", ""]
    return "\n".join([*lines, *(f"   {row}" for row in rows)])


def insert_benchmarks(app, docname, source):
    """Replace lines such as ``.. benchmark:: grid_search rows 0`` by a table.

    The words after the colons are the file, the measure (optional) and the number of digits.
    """

    def insert(match):
        name, measure, digits = match[1], match[2], int(match[3])
        table = read_benchmark(name, measure)
        if "task" not in table:
            return as_csv_table(table, digits)
        return "\n".join(
            f".. rubric:: {task}\n\n{as_csv_table(rows.drop(columns='task'), digits)}\n"
            for task, rows in table.groupby("task", sort=False)
        )

    pattern = r"^\.\. benchmark:: (\w+)(?: (\w+))? (\d)$"
    source[0] = re.sub(pattern, insert, source[0], flags=re.MULTILINE)


def read_markdown(app, relative_path, parent_docname, content):
    """Convert an included Markdown file with headings, lists and code to reST."""
    if relative_path.suffix != ".md":
        return
    lines = []
    for line in re.sub(r"`([^`]+)`", r"``\1``", content[0]).splitlines():
        if heading := re.match(r"(#+) (.*)", line):
            underline = "=-~"[len(heading[1]) - 1]
            lines += [heading[2], underline * len(heading[2])]
        else:
            lines.append(line)
    content[0] = "\n".join(lines)


def skip_member(app, what, name, obj, skip, options):
    """Skip `set_fit_request` and similar methods, which scikit-learn generates, and tuples'."""
    is_request = re.fullmatch(r"set_\w+_request", name)
    is_of_tuple = obj is tuple.count or obj is tuple.index
    is_field = type(obj).__name__ == "_tuplegetter"  # documented as a parameter
    return True if is_request or is_of_tuple or is_field else None


def setup(app):
    # It only copies files, but does not say that pages may be read in parallel.
    app.extensions["sphinx-mathjax-offline"].parallel_read_safe = True
    app.connect("include-read", read_markdown)
    app.connect("source-read", insert_benchmarks)
    app.connect("autodoc-skip-member", skip_member)
