"""The cost of imports, the public names, their types, and texts that estimators share."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sklearn.base import BaseEstimator

import sklembed
from sklembed._trained import TrainedEstimator


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
        "ray",
        "pyarrow",
    }


def test_neither_scale_nor_a_data_set_imports_ray_or_torch():
    pytest.importorskip("pyarrow")
    modules = imported_by(
        "import sklembed.datasets\n"
        "from sklembed.scale import encode_dataset, import_vectors\n"
        "sklembed.datasets.load_emoji()"
    )
    assert not modules & {"ray", "torch", "transformers", "skorch"}


HEAVY = {"torch", "transformers", "skorch", "xgboost", "matplotlib", "ray"}
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


PROGRAM = """
import sklembed

sklembed.ContrastiveProjector(n_components=16, lr=1e-3)
sklembed.FusionClassifier("late", blocks={{"all": slice(None)}})
sklembed.FrozenEncoder("a/model", batch_size=8)
sklembed.PerModalityUnion([])
sklembed.{call}
"""
CALLS_WITH_AN_UNKNOWN_KEYWORD = [
    "CallableBackend(print, n_feature=2)",
    "CanonicalAligner(n_component=2)",
    "ContrastiveProjector(n_component=16)",
    "CrossAttentionAdaptor(mixup=True)",
    "DecisionFusionClassifier(weight=None)",
    "EmbeddingClassifier(member=['kernel'])",
    "EmbeddingRegressor(class_weight='balanced')",
    "EmbeddingStore(dtypes='float16')",
    "FinetunedClassifier(None, epochs=3)",
    "FinetunedRegressor(None, C=1.0)",
    "FrozenEncoder('a/model', store_dtype='float16')",
    "FusionClassifier(fusion='late')",
    "FusionRegressor(class_weight='balanced')",
    "KernelFusionClassifier(gammas='auto')",
    "KernelFusionRegressor(class_weight='balanced')",
    "ModalityGapAligner(kind='shift')",
    "MultimodalVectorizer(encoder=None)",
    "PatchSegmenter(grid=(2, 2))",
    "PerModalityUnion([], n_job=2)",
    "SharedFusionEncoder(structure_weight=1.0)",
    "ZeroShotClassifier(class_names=[])",
]


def test_mypy_rejects_unknown_keywords_of_public_classes(tmp_path):
    api = pytest.importorskip("mypy.api")
    called = {call.split("(")[0] for call in CALLS_WITH_AN_UNKNOWN_KEYWORD}
    public = {n for n in sklembed.__all__ if isinstance(getattr(sklembed, n), type)}
    assert called == public
    program = tmp_path / "program.py"
    calls = "\nsklembed.".join(CALLS_WITH_AN_UNKNOWN_KEYWORD)
    program.write_text(PROGRAM.format(call=calls))
    # Analysing torch and pandas takes a minute, so only this package and the program are read.
    options = ["--config-file=", "--follow-imports=skip", f"--cache-dir={tmp_path}"]
    package = str(Path(sklembed.__file__).parent)
    report, _, _ = api.run([*options, package, str(program)])
    errors = [line for line in report.splitlines() if "program.py" in line]
    errors = [line for line in errors if ": error: " in line]
    for call in CALLS_WITH_AN_UNKNOWN_KEYWORD:
        name = call.split("(")[0]
        assert any("keyword argument" in e and f'for "{name}"' in e for e in errors), (
            report
        )
    assert len(errors) == len(CALLS_WITH_AN_UNKNOWN_KEYWORD), report


SHARED = {*TrainedEstimator._parameter_constraints, "blocks", "n_jobs"}
# An encoder is not trained, and these estimators have no network of their own.
OF_THEIR_OWN = {
    "FrozenEncoder": {"device", "batch_size", "verbose"},
    "ModalityGapAligner": {"random_state"},
    "KernelFusionClassifier": {"random_state"},
    "KernelFusionRegressor": {"random_state"},
    "EmbeddingClassifier": {"random_state"},
    "EmbeddingRegressor": {"random_state"},
    "FinetunedClassifier": {"random_state"},
    "FinetunedRegressor": {"random_state"},
}


def parameter_texts(estimator):
    """Return the first sentence of each parameter's description, by name."""
    section = re.search(
        r"\nParameters\n-+\n(.*?)\n\n\w+\n---", inspect.getdoc(estimator), re.DOTALL
    )
    texts = {}
    for entry in re.split(r"\n(?=\S)", section.group(1)):
        header, description = entry.split("\n", 1)
        first_sentence = " ".join(description.split()).split(". ")[0].rstrip(".")
        for parameter in header.split(" : ")[0].split(", "):
            texts[parameter] = first_sentence
    return texts


def test_a_shared_parameter_has_one_text():
    texts = {parameter: {} for parameter in SHARED}
    for name in sklembed.__all__:
        estimator = getattr(sklembed, name)
        if not (isinstance(estimator, type) and issubclass(estimator, BaseEstimator)):
            continue
        for parameter, text in parameter_texts(estimator).items():
            if parameter in SHARED - OF_THEIR_OWN.get(name, set()):
                texts[parameter].setdefault(text, []).append(name)
    for parameter, names_by_text in texts.items():
        assert len(names_by_text) == 1, (parameter, names_by_text)
