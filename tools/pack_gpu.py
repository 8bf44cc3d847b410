"""Write the packages that `tools/gpu.sh` may miss to one archive.

The archive contains ``site``, a directory of packages for Python 3.12, and ``minilm``, the
text encoder with weights in float16. Call it by ``make gpu-packages``.
"""

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from sklembed.encoders import minilm

ARCHIVE = Path(".gpu/packages.tar.xz")
# Dependencies of sklembed and of its tests that images with torch lack, or have in versions
# that are too old. Their other dependencies come with torch, transformers and scikit-learn.
PACKAGES = [
    "accelerate",  # of peft
    "efficientnet-lite-pytorch",
    "filelock",
    "peft",
    "platformdirs",
    "prettytable",  # of skops
    "psutil",  # of accelerate
    "pydot",  # of skrub
    "skops",
    "skorch",
    "skrub",
    "transformers",
    "wcwidth",  # of prettytable
]


def install(site):
    """Install the packages for Python 3.12 on Linux."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile"]
    command += ["--no-deps", "--only-binary=:all:", "--python-version", "3.12"]
    command += ["--constraint", "constraints.txt", "--target", str(site), *PACKAGES]
    subprocess.run(command, check=True)


def copy_minilm(target):
    """Copy the checkpoint with its weights in float16."""
    source = Path(minilm())
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = {}
    for name, value in load_file(source / "model.safetensors").items():
        weights[name] = value.half() if value.is_floating_point() else value
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    # A newer transformers reads the dtype of the file from the configuration.
    config = json.loads((target / "config.json").read_text())
    config.pop("torch_dtype", None)
    (target / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))


def main():
    """Write the archive and print its size."""
    ARCHIVE.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        install(folder / "site")
        copy_minilm(folder / "minilm")
        with tarfile.open(ARCHIVE, "w:xz") as archive:
            for part in ("site", "minilm"):
                archive.add(folder / part, part)
    print(f"{ARCHIVE}: {ARCHIVE.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
