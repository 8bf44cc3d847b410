"""Identity, configuration and files of a checkpoint, read without loading the model."""

import functools
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sklembed.encoders.file_hashes import hash_directory
from sklembed.encoders.networks import name_directory
from sklembed.encoders.sentence_transformers import (
    is_static_embedding,
    read_sentence_transformer,
    read_static_embedding,
    wrapping_advice,
)

# Files of weights, in the order in which transformers looks for them.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_VOCABULARIES = (
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
_IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


# Owners of popular models, by the start of the name.
_OWNERS = {
    "all-": "sentence-transformers",
    "bge-": "BAAI",
    "clip-vit-": "openai",
    "convnext": "facebook",
    "dinov": "facebook",
    "e5-": "intfloat",
    "gte-": "thenlper",
    "jina-": "jinaai",
    "multilingual-e5-": "intfloat",
    "mxbai-": "mixedbread-ai",
    "nomic-": "nomic-ai",
    "qwen": "Qwen",
    "resnet-": "microsoft",
    "siglip": "google",
    "snowflake-": "Snowflake",
    "swin": "microsoft",
    "vit-": "google",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory or a model of the hub, accessed without loading weights."""

    model: str
    revision: str | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False

    @property
    def is_directory(self) -> bool:
        """Whether the model is a local directory instead of a hub id."""
        return os.path.isdir(self.place)

    @property
    def place(self) -> str:
        """The directory with ``~`` expanded, or the hub id."""
        return os.path.expanduser(self.model)

    def identity(self) -> str:
        """Return a key of the content: the hub's commit, or a hash of a directory's files.

        It is read once per object, and each call of an encoder makes a new object.
        """
        return self._identity

    @functools.cached_property
    def _identity(self) -> str:
        if self.is_directory:
            return hash_directory(os.path.realpath(self.place))
        return f"{self.model}@{self._commit()}"

    def config(self):
        """Load the configuration, again when the content has changed.

        Raises
        ------
        OSError
            If there is no configuration, or it is damaged.
        """
        if self.is_directory and self.file("config.json") is None:
            modules = self.read_json("modules.json")
            raise OSError(
                _no_config_message(f"The directory {self.model!r}", self, modules)
            )
        return _read_config(self, self.identity())

    @property
    def name(self) -> str:
        """A readable name: the hub id, or the last two parts of a directory's path."""
        if self.is_directory:
            return name_directory(self.place)
        return self.model

    @property
    def runs_remote_code(self) -> bool:
        """Whether the checkpoint contains modelling code that may be run."""
        return self.trust_remote_code and bool(getattr(self.config(), "auto_map", None))

    def other_code(self) -> dict[str, str]:
        """Map other hub repositories with the checkpoint's modelling code to their commits."""
        if not self.trust_remote_code:
            return {}
        config = self.read_json("config.json") or {}
        commits = {}
        for reference in (config.get("auto_map") or {}).values():
            repository, _, name = str(reference).partition("--")
            # Code in the checkpoint itself is part of the checkpoint's commit.
            if name and repository != self.model:
                module = name.partition(".")[0]
                commits[repository] = _resolve_code(
                    repository, module, self.local_files_only
                )
        return dict(sorted(commits.items()))

    def model_source(self) -> dict[str, Any]:
        """Return `source` for the model and its configuration, with the commit of other code."""
        source = self.source()
        commits = list(self.other_code().values())
        if len(commits) == 1:
            source["code_revision"] = commits[0]
        return source

    def source(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained` that load the content of `identity`."""
        return {
            "pretrained_model_name_or_path": self.place,
            "revision": None if self.is_directory else self._commit(),
            "local_files_only": self.local_files_only,
            "trust_remote_code": self.trust_remote_code,
        }

    def file(self, name: str, *, optional: bool = False) -> Path | None:
        """Return the path of a file of the checkpoint, or None if there is no such file.

        Parameters
        ----------
        name : str
            Path within the checkpoint.
        optional : bool, default=False
            Whether a file counts as absent if an offline cache has no record of it.

        Raises
        ------
        OSError
            If the download fails, an offline cache has no record of the file, or the
            path leads out of the checkpoint.
        """
        # Files elsewhere are no part of the identity, so that vectors might change.
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise OSError(
                f"{self.model!r} names the file {name!r}, which is not within the "
                "checkpoint. Do not trust its files."
            )
        if self.is_directory:
            path = Path(self.place, name)
            return path if path.is_file() else None
        from huggingface_hub import (
            _CACHED_NO_EXIST,
            hf_hub_download,
            try_to_load_from_cache,
        )
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        commit = self._commit()
        path = try_to_load_from_cache(self.model, name, revision=commit)
        if path is _CACHED_NO_EXIST:
            return None
        if path is not None:
            return Path(path)
        try:
            path = hf_hub_download(
                self.model,
                name,
                revision=commit,
                local_files_only=self.local_files_only,
            )
        except Exception as error:  # of the network, the hub or the disk
            is_local = isinstance(error, LocalEntryNotFoundError)
            if isinstance(error, EntryNotFoundError) and not is_local:
                return None  # the hub has no such file
            if not (is_local and self._is_offline):
                raise OSError(
                    f"{name!r} of {self.model!r}, which changes vectors, could not be "
                    f"downloaded from the hub: {_reason(error.__cause__ or error)}. Nothing "
                    "was encoded; try again."
                ) from error
            if optional or _is_absent_from_listing(self.model, commit, name):
                return None
            raise OSError(
                f"The local cache of {self.model!r} does not record whether the repository has "
                f"{name!r}, which changes vectors. Use the model once while online, or pass "
                f"the directory of a complete download: hf download {self.model}."
            ) from error
        return Path(path)

    def read_json(self, name: str, *, optional: bool = False) -> Any:
        """Return the content of a JSON file, or None if there is no such file.

        Raises
        ------
        OSError
            As `file`; also if the file is damaged.
        """
        path = self.file(name, optional=optional)
        return None if path is None else _parse_json(path)

    def missing_file(self, name: str, index: str) -> OSError:
        """Return the error for a file that is absent although an index lists it."""
        return OSError(
            f"{self.model!r} has no file {name!r}, although its {index} lists it. Download "
            "the complete model again, or save it again."
        )

    def check_weights(self) -> None:
        """Check the files of weights before they are loaded.

        Raises
        ------
        OSError
            If a file is a git-lfs pointer or damaged, or a shard is missing.
        ValueError
            If the weights are pickles, and `allow_pickle` is False.
        """
        names = _WEIGHTS
        explicit = (self.read_json("config.json") or {}).get("transformers_weights")
        if explicit is not None:  # transformers then reads this file alone
            names = (str(explicit),)
        for name in names:
            self._check_is_allowed(name)
            path = self.file(name, optional=True)
            if path is None:
                continue
            if not name.endswith(".json"):
                _check_weights_file(path)
                return
            for shard in _shards(self, name):
                self._check_is_allowed(shard)
                shard_path = self.file(shard)
                if shard_path is None:
                    raise self.missing_file(shard, name)
                _check_weights_file(shard_path)
            return

    def _check_is_allowed(self, name) -> None:
        """Raise an error for the name of a pickle, before it is downloaded."""
        if self.allow_pickle or ".safetensors" in name:
            return
        if self.is_directory and self.file(name) is None:
            return
        raise ValueError(
            f"{self.model!r} has no weights in safetensors files, and files such as "
            f"{name} are pickles. If you trust their author, pass allow_pickle=True; or "
            "load the model by transformers and save it by save_pretrained, which writes "
            "safetensors."
        )

    def check_tokenizer(self) -> None:
        """Download and check the tokenizer's files; transformers would replace missing ones.

        Raises
        ------
        OSError
            If a file could not be downloaded, is a git-lfs pointer or damaged.
        """
        paths = [self.file(name) for name in _TOKENIZER_FILES]
        paths += [self.file(name, optional=True) for name in _VOCABULARIES]
        for path in paths:
            if path is None:
                continue
            if path.suffix == ".json":
                _parse_json(path)
            else:
                check_file(path)

    def image_processor(self) -> dict[str, Any]:
        """Download and check the files of the image processor, and return its settings.

        Raises
        ------
        OSError
            If a file could not be downloaded, is a git-lfs pointer or damaged.
        """
        preprocessor, processor = [
            self.read_json(name) or {} for name in _IMAGE_PROCESSOR_FILES
        ]
        return processor.get("image_processor") or preprocessor

    def tensors(self, folder: str) -> dict[str, Any]:
        """Load the weights of one module of a sentence-transformers model.

        Raises
        ------
        OSError
            If the folder has no weights, or they are damaged.
        ValueError
            If the weights are pickles, and `allow_pickle` is False.
        """
        path = self.file(f"{folder}/model.safetensors", optional=True)
        if path is not None:
            from safetensors.torch import load_file

            check_file(path)
            return load_file(path)
        name = f"{folder}/pytorch_model.bin"
        self._check_is_allowed(name)
        path = self.file(name)
        if path is None:
            raise OSError(
                f"The folder {folder!r} of {self.model!r} has neither model.safetensors nor "
                "pytorch_model.bin. Save the complete model with SentenceTransformer.save."
            )
        check_file(path)
        return _read_pickle(path, "cpu")

    @property
    def has_config(self) -> bool:
        """Whether a directory exists and has the file that names the kind of its model."""
        if not self.is_directory:
            return False
        return self.is_static or self.file("config.json") is not None

    @property
    def is_static(self) -> bool:
        """Whether the model is a table of token vectors. False if no file can be read."""
        try:
            model_type = (self.read_json("config.json") or {}).get("model_type")
            if model_type is not None:
                return model_type == "model2vec"
            modules = self.read_json("modules.json")
        except (OSError, ImportError):  # raised again when the model is described
            return False
        return is_static_embedding(modules)

    def static_embedding(self) -> dict[str, Any]:
        """Read the settings of static token embeddings: folder, limit, prompt, head.

        Raises
        ------
        ValueError
            If a setting of sentence-transformers is not supported.
        """
        return read_static_embedding(self, self.identity())

    def sentence_transformer(self) -> dict[str, Any]:
        """Read the settings of sentence-transformers: pooling, lengths, prompt, head.

        Raises
        ------
        ValueError
            If a setting is not supported.
        """
        return read_sentence_transformer(self, self.identity())

    def _commit(self) -> str:
        commit, error = self._resolution
        if error is not None:
            raise error
        return commit

    @functools.cached_property
    def _resolution(self) -> tuple[str, None] | tuple[None, OSError]:
        """The commit, or the error: offline, each try would wait for the hub again."""
        try:
            commit = _resolve_commit(self.model, self.revision, self.local_files_only)
        except OSError as error:
            return None, error
        return commit, None

    @property
    def _is_offline(self) -> bool:
        """Whether only the local cache is read, which records the files of the hub."""
        from huggingface_hub import constants

        return self.local_files_only or constants.HF_HUB_OFFLINE


@functools.lru_cache(maxsize=64)
def _resolve_commit(model, revision, local_files_only) -> str:
    """Resolve a revision to a commit by the hub or its local cache, once per process.

    Raises
    ------
    OSError
        If the model is neither a directory nor found.
    """
    from transformers.utils import cached_file

    if model.startswith(("http://", "https://")):
        hub_id = "/".join(model.split("/")[3:5])
        raise OSError(f"model={model!r} is a URL. Pass the hub id, such as {hub_id!r}.")
    if os.path.isfile(os.path.expanduser(model)):
        raise OSError(
            f"model={model!r} is a file. Pass the directory of the checkpoint, "
            f"{os.path.dirname(model) or '.'!r}, which contains its config.json."
        )
    try:
        path = cached_file(
            model, "config.json", revision=revision, local_files_only=local_files_only
        )
    except (OSError, ValueError) as error:
        # Offline, config.json may be missing because the repository has none.
        path, modules = _find_modules(model, revision, local_files_only=True)
        if not is_static_embedding(modules):
            message = _not_found_message(model, local_files_only, error)
            raise OSError(message) from error
    if path is None:
        path, modules = _find_modules(model, revision, local_files_only)
        if not is_static_embedding(modules):
            checkpoint = Checkpoint(model, revision, local_files_only)
            raise OSError(
                _no_config_message(f"The hub repository {model!r}", checkpoint, modules)
            )
    return Path(path).parent.name  # …/snapshots/<commit>/<file>


def _find_modules(model, revision, local_files_only):
    """Return path and content of modules.json of a hub model, or None and None."""
    from transformers.utils import cached_file

    try:
        path = cached_file(
            model,
            "modules.json",
            revision=revision,
            local_files_only=local_files_only,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # not the name of a repository
        path = None
    if path is None:
        return None, None
    return path, _parse_json(Path(path))


def _not_found_message(model, local_files_only, error) -> str:
    is_path = "\\" in model or model.count("/") > 1 or model.startswith((".", "~", "/"))
    if is_path:
        place = os.path.abspath(os.path.expanduser(model))
        return (
            f"There is no directory {place!r} on this machine. An encoder contains no weights: "
            "copy the checkpoint there, or set another path with set_params(model=...)."
        )
    where = "the local cache" if local_files_only else "the hub or the local cache"
    return (
        f"The model {model!r} is neither a local directory nor found in {where}. "
        f"{_suggestion(model)}Check the name, download the model while online, or pass the "
        "directory of a checkpoint. Offline, local_files_only=True avoids waiting for the hub. "
        f"(Error of transformers: {_reason(error)})"
    )


@functools.lru_cache(maxsize=64)
def _resolve_code(repository, module, local_files_only) -> str:
    """Resolve the commit of a repository of code, as `_resolve_commit` does for a model."""
    from transformers.utils import cached_file

    path = cached_file(repository, f"{module}.py", local_files_only=local_files_only)
    return Path(path).parent.name


def _suggestion(model: str) -> str:
    """Suggest a hub id for a name without an owner."""
    if "/" in model:
        return ""
    suggested_owner = "sentence-transformers"
    for start, owner in _OWNERS.items():
        if model.lower().startswith(start):
            suggested_owner = owner
            break
    return f"Did you mean {suggested_owner}/{model}? "


def _reason(error: BaseException) -> str:
    """Return the type and first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _is_absent_from_listing(model, commit, name) -> bool:
    """Return whether a complete download has a list of files that does not contain `name`."""
    try:
        from huggingface_hub import get_cached_repo_tree
    except ImportError:  # huggingface_hub 1
        return False
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        files = get_cached_repo_tree(model, revision=commit)
    except CachedRepoTreeNotFoundError:
        return False
    return all(file.path != name for file in files)


def _no_config_message(place, checkpoint, modules) -> str:
    """Explain why there is no configuration, and how to continue."""
    transformer = next(iter(modules or []), {})
    kind = transformer.get("type", "").rsplit(".", 1)[-1]
    if kind not in ("", "Transformer"):
        return (
            f"{place} has no config.json: it is a sentence-transformers model whose first "
            f"module is {kind}, which is not supported. {wrapping_advice(checkpoint)}"
        )
    if transformer.get("path"):
        return (
            f"{place} has no config.json: it is in the old layout of sentence-transformers. "
            "Load it with SentenceTransformer, save it again, and pass the new directory."
        )
    message = (
        f"{place} has no config.json, so transformers cannot load it. Pass a directory that "
        "save_pretrained wrote, or another hub id; wrap other models in a CallableBackend."
    )
    if checkpoint.is_directory:
        folder = Path(checkpoint.place)
        configs = [
            *folder.glob("*/config.json"),
            *folder.glob("snapshots/*/config.json"),
        ]
        if configs:
            message += f" Did you mean {str(configs[0].parent)!r}?"
    return message


@functools.lru_cache(maxsize=64)
def _read_config(checkpoint, identity):
    """Load a configuration once for each identity."""
    from transformers import AutoConfig

    _check_no_kernels(checkpoint, checkpoint.read_json("config.json"))
    try:
        return AutoConfig.from_pretrained(**checkpoint.model_source())
    except (ImportError, OSError, ValueError):
        raise
    except Exception as error:  # values of a wrong type raise errors of any type
        raise OSError(
            f"The config.json of {checkpoint.model!r} cannot be read ({_reason(error)}): "
            "it is damaged, or was written for another version of transformers. "
            "Download the model again."
        ) from error


def _check_no_kernels(checkpoint, config) -> None:
    """Raise an error if a configuration names a kernel, which is code on the hub."""
    for key, value in (config or {}).items():
        if isinstance(value, dict):
            _check_no_kernels(checkpoint, value)
        elif key.endswith("_implementation") and "/" in str(value):
            raise ValueError(
                f"The config.json of {checkpoint.model!r} has {key}={value!r}, which is "
                "code on the hub, and is not run. Remove the entry."
            )


def _parse_json(path):
    check_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise OSError(
            f"The file {str(path)!r} is not valid JSON ({error}): it is damaged or truncated. "
            "Download it again."
        ) from error
    if path.name == "modules.json":
        is_valid = isinstance(content, list) and all(map(_is_module, content))
    else:
        is_valid = isinstance(content, dict)
    if not is_valid:
        raise OSError(
            f"The file {str(path)!r} does not have the entries of a {path.name}: it is "
            "damaged. Download it again."
        )
    return content


def _is_module(entry) -> bool:
    """Return whether an entry of modules.json has a class and a folder."""
    if not isinstance(entry, dict):
        return False
    return isinstance(entry.get("type"), str) and isinstance(entry.get("path"), str)


def check_file(path) -> None:
    """Check that a file is not empty, truncated or saved in place of another.

    Raises
    ------
    OSError
        If the file is empty, a git-lfs pointer, a web page, or truncated weights.
    """
    path = Path(path)
    with open(path, "rb") as file:
        start = file.read(64).lstrip()
    if not start:
        problem = "is empty. Download it again"
    elif start.startswith(b"version https://git-lfs"):
        problem = (
            "is a git-lfs pointer instead of the content. Run `git lfs pull` in its directory, "
            "or download it again"
        )
    elif start.lower().startswith((b"<!doctype", b"<html")):
        problem = "is a web page that was saved in place of the file. Download it again"
    elif _is_truncated(path, start):
        problem = "is damaged or truncated. Download it again"
    else:
        return
    raise OSError(f"The file {str(path)!r} {problem}.")


def _is_truncated(path, start) -> bool:
    """Return whether weights do not match their header; False for other files."""
    if path.suffix == ".bin":
        return start.startswith(b"PK") and not zipfile.is_zipfile(path)
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, framework="numpy"):  # validates the header and the size
            return False
    except SafetensorError:
        return True


def _check_weights_file(path) -> None:
    """Check a file of weights, of which a pickle must contain nothing else."""
    check_file(path)
    if ".safetensors" not in path.name:
        _read_pickle(path, "meta")  # without the numbers


def _read_pickle(path, device) -> dict[str, Any]:
    """Load weights from a pickle. torch refuses everything but tensors and containers."""
    import torch

    try:
        return torch.load(path, map_location=device, weights_only=True)
    # torch raises errors of any type, and recommends to load the file without checks.
    except Exception as error:
        raise OSError(
            f"The file {str(path)!r} cannot be read as weights. It is damaged, or contains "
            "more than weights: do not trust it."
        ) from error


def _shards(checkpoint, name) -> list[str]:
    """Return the names of the files that an index lists."""
    weight_map = checkpoint.read_json(name).get("weight_map")
    shards = set(weight_map.values()) if isinstance(weight_map, dict) else {None}
    if not all(isinstance(shard, str) for shard in shards):
        raise OSError(
            f"The file {name!r} of {checkpoint.model!r} does not map weights to files: it "
            "is damaged. Download it again."
        )
    return sorted(shards)
