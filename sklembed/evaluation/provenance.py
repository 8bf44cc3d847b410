"""The encoders of a fitted model: where their weights come from, and their license."""

import os
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, metadata, packages_distributions
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from sklearn.base import BaseEstimator

from sklembed.encoders import FrozenEncoder
from sklembed.finetune import FinetunedClassifier, FinetunedRegressor

UNKNOWN = "unknown"
_FINETUNED = (FinetunedClassifier, FinetunedRegressor)
_LONGEST_LICENSE = 60  # characters; longer entries of packages are the whole text
_CLASSIFIER = "License :: "


class FittedEncoder(NamedTuple):
    """An encoder in a fitted model."""

    encoder: FrozenEncoder
    training: str  # how its weights were changed; "none, frozen" if they were not

    @property
    def name(self) -> str:
        """The name of the model: hub id, directory or name of a backend."""
        description = self.encoder.space_["description"]
        for entry in ("label", "name"):
            if entry in description:
                return str(description[entry])
        if isinstance(self.encoder.model, str | os.PathLike):
            return Path(self.encoder.model).name
        return type(self.encoder.model).__name__

    @property
    def column(self) -> str | None:
        """The column that the encoder was fitted on, if it has a name."""
        names = getattr(self.encoder, "feature_names_in_", [None])
        return names[0]


def fitted_encoders(part, training="none, frozen", visited=None) -> list[FittedEncoder]:
    """List the fitted encoders of a model, in its parameters and fitted copies."""
    visited = set() if visited is None else visited
    if id(part) in visited:
        return []
    visited.add(id(part))
    if isinstance(part, FrozenEncoder):
        return [FittedEncoder(part, training)] if hasattr(part, "space_") else []
    if isinstance(part, _FINETUNED) and hasattr(part, "change_"):  # fitted
        training = _describe_training(part)
    parts = []
    # The calibrated classifiers of CalibratedClassifierCV are no BaseEstimators.
    is_of_sklearn = type(part).__module__.startswith("sklearn.")
    if isinstance(part, dict):
        parts = list(part.values())
    elif isinstance(part, list | tuple):
        parts = part
    elif isinstance(part, BaseEstimator) or is_of_sklearn:
        parts = list(getattr(part, "__dict__", {}).values())
    encoders = []
    for nested in parts:
        encoders += fitted_encoders(nested, training, visited)
    return encoders


def _describe_training(finetuned) -> str:
    """Return how a fine-tuned estimator changed its encoder."""
    if not finetuned.change_:
        return f"none: method={finetuned.method!r} kept the frozen encoder"
    n_changed = sum(value.size for value in finetuned.change_.values())
    return f"method={finetuned.method!r}, {n_changed:,} trained parameters"


def describe_encoders(encoders, licenses, download) -> pd.DataFrame:
    """Return a table with a column for each different encoder.

    Parameters
    ----------
    encoders : list of FittedEncoder
        The encoders.
    licenses : dict of str to str
        Licenses by the name of the model, which are not looked up.
    download : bool
        Whether the model page of a hub model may be downloaded.
    """
    columns: dict[tuple, dict] = {}
    for fitted in encoders:
        key = fitted.encoder.space_["fingerprint"], fitted.training
        if key not in columns:
            columns[key] = _describe(fitted, licenses, download)
        elif fitted.column is not None:
            columns[key]["columns"].append(fitted.column)
    table = {}
    for number, column in enumerate(columns.values(), start=1):
        names = dict.fromkeys(map(str, column["columns"]))
        title = column["model"]
        if title in table:
            title = f"{title} ({number})"
        table[title] = column | {"columns": ", ".join(names)}
    frame = pd.DataFrame(table).fillna("")
    return frame[frame.ne("").any(axis=1)]


def _describe(fitted, licenses, download) -> dict:
    """Return the properties of an encoder."""
    encoder, space = fitted.encoder, fitted.encoder.space_
    description = space["description"]
    package = _find_package(encoder)
    identity = str(description.get("checkpoint", ""))
    repository, _, commit = identity.rpartition("@")
    properties = {
        "model": fitted.name,
        "columns": [] if fitted.column is None else [fitted.column],
        "modality": space["modality"],
        "license": licenses.get(fitted.name),
    }
    if properties["license"] is None:
        readme = _find_readme(encoder, repository, commit, download)
        properties["license"] = _read_license(readme, package)
    properties["package"] = f"{package['Name']} {package['Version']}" if package else ""
    if repository:
        properties["commit on the hub"] = commit
    elif identity:
        properties["digest of the files"] = identity
    else:
        properties["version"] = str(description.get("version", UNKNOWN))
    properties["fingerprint of the vectors"] = space["fingerprint"]
    properties["features"] = str(space["n_features"])
    properties["output"] = str(description.get("pooling", description["output"]))
    if description.get("max_length"):
        properties["tokens read"] = f"the first {description['max_length']}"
    properties["precision"] = str(description.get("dtype", ""))
    properties["training"] = fitted.training
    return properties


def _find_package(encoder):
    """Return the metadata of the installed package that contains the weights, or None."""
    name = getattr(getattr(encoder.model, "_load", None), "distribution", None)
    if isinstance(encoder.model, str | os.PathLike):
        name = _distribution_of(Path(encoder.model).expanduser())
    try:
        return metadata(name) if name else None
    except PackageNotFoundError:
        return None


def _distribution_of(directory) -> str | None:
    """Return the installed package that a directory belongs to."""
    if not directory.is_dir():
        return None
    directory = directory.resolve()
    for entry in sys.path:
        root = Path(entry).resolve()
        if (
            root.name in ("site-packages", "dist-packages")
            and root in directory.parents
        ):
            module = directory.relative_to(root).parts[0]
            return next(iter(packages_distributions().get(module, [])), None)
    return None


def _find_readme(encoder, repository, commit, download) -> Path | None:
    """Return the model page of a checkpoint: in its directory or in the hub's cache."""
    if not isinstance(encoder.model, str | os.PathLike):
        return None
    if not repository:
        readme = Path(encoder.model).expanduser() / "README.md"
        return readme if readme.is_file() else None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    if download:
        try:
            return Path(hf_hub_download(repository, "README.md", revision=commit))
        except EntryNotFoundError as error:
            if isinstance(error, OSError):  # offline, and not in the cache
                raise OSError(
                    f"The model page of {repository!r} could not be downloaded. Set "
                    "download=False, or pass the license in licenses."
                ) from error
            return None
    readme = try_to_load_from_cache(repository, "README.md", revision=commit)
    return Path(readme) if isinstance(readme, str) else None


def _read_license(readme, package) -> str:
    """Return the license that a model page or the metadata of a package states."""
    stated = None
    if readme is not None:
        from huggingface_hub import metadata_load

        entries = {}
        with suppress(Exception):  # a damaged page states nothing
            entries = metadata_load(readme) or {}
        stated = entries.get("license_name") or entries.get("license")
        if isinstance(stated, list):
            stated = ", ".join(map(str, stated))
    if stated:
        return f"{stated} (stated by README.md)"
    stated = _license_of_package(package)
    return f"{stated} (stated by the package)" if stated else UNKNOWN


def _license_of_package(package) -> str | None:
    """Return the license in the metadata of a package; None if it states none."""
    if package is None:
        return None
    for entry in ("License-Expression", "License"):
        stated = " ".join((package.get(entry, "")).split())
        if stated and stated != "UNKNOWN" and len(stated) <= _LONGEST_LICENSE:
            return stated
    for classifier in package.get_all("Classifier") or []:
        if classifier.startswith(_CLASSIFIER):
            return classifier.rpartition(" :: ")[2]
    return None
