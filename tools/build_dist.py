"""Build the sdist and the wheel in dist/, check them, and run the wheel outside the repository.

Call it by ``make dist``. In a new environment with the wheel alone it measures the import
and runs the code of README and tutorial, and the quickstart, which take vectors from the
default store. The option ``--tests`` also runs the tests of the sdist against the wheel;
``--content`` stops after the content is checked.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
MAX_IMPORT_SECONDS = 0.5
N_IMPORTS = 9
HEAVY = {"numpy", "torch", "transformers", "skrub", "matplotlib"}
LICENCES = {
    "LICENSE",
    "sklembed/datasets/data/LICENSES.md",
    "sklembed/datasets/data/APACHE-2.0.txt",
}


def main():
    """Build, check and run the distributions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--content", action="store_true")
    parser.add_argument("--tests", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sklembed-dist-") as folder:
        folder = Path(folder)
        sdist, wheel = build(folder)
        check_sdist(sdist)
        check_wheel(wheel)
        if options.content:
            return
        python = install(folder, wheel, "demo,test" if options.tests else "demo")
        check_import(python, folder)
        run_examples(python, folder)
        if options.tests:
            run_tests(python, folder, sdist)
    print("The distributions in dist/ are ready.")


def run(*command, **options):
    """Run a command, and stop if it fails."""
    print("+", *command, flush=True)
    return subprocess.run([str(part) for part in command], check=True, **options)


def environment(folder):
    """Create an environment; return its interpreter."""
    venv.create(folder, with_pip=True)
    return folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"


def build(folder):
    """Build both distributions, the wheel from the sdist, and check their metadata."""
    python = environment(folder / "build")
    run(python, "-m", "pip", "install", "--quiet", "build", "twine")
    shutil.rmtree(DIST, ignore_errors=True)
    run(python, "-m", "build", "--outdir", DIST, ROOT)
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    run(python, "-m", "twine", "check", "--strict", sdist, wheel)
    return sdist, wheel


def tracked_files(*paths):
    """Return the files of the repository under paths."""
    listed = run("git", "ls-files", *paths, cwd=ROOT, capture_output=True, text=True)
    return set(listed.stdout.splitlines())


def check_sdist(sdist):
    """Check that the sdist has exactly the files of the repository, and its metadata."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    compare(sdist, "files", names - {"PKG-INFO"}, tracked_files())


def check_wheel(wheel):
    """Check that the wheel has exactly the files of the package, and the licences."""
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    compare(wheel, "files", names - metadata, tracked_files("sklembed"))
    licences = {name.partition("/licenses/")[2] for name in metadata} - {""}
    compare(wheel, "licences", licences, LICENCES)


def compare(archive, kind, names, expected):
    """Stop if an archive lacks files or has others."""
    if names != expected:
        sys.exit(
            f"{archive.name}: missing {sorted(expected - names)}, "
            f"unexpected {sorted(names - expected)}. Are new files committed?"
        )
    print(f"{archive.name}: {len(names)} {kind} as expected")


def install(folder, wheel, extras):
    """Install the wheel in a new environment with the tested versions."""
    python = environment(folder / "installed")
    pip = [python, "-m", "pip", "install", "--quiet", "--no-compile"]
    pip += ["--constraint", ROOT / "constraints.txt"]
    run(*pip, "torch")  # alone, so that no other package picks a build of it
    run(*pip, f"{wheel}[{extras}]")
    run(python, "-m", "pip", "check")
    return python


def check_import(python, folder):
    """Check that the import is fast and light, and comes from the wheel."""
    code = "import sys, sklembed; print(sklembed.__file__, *sys.modules)"
    seconds = []
    for _ in range(N_IMPORTS):
        start = time.perf_counter()
        printed = run(python, "-c", code, cwd=folder, capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
    path, *modules = printed.stdout.split()
    if "site-packages" not in path or HEAVY & set(modules):
        sys.exit(f"imported {path} with {HEAVY & set(modules)}")
    median = statistics.median(seconds)
    print(f"import sklembed: {median:.2f} s, Python included")
    if median > MAX_IMPORT_SECONDS:
        sys.exit(f"the import takes more than {MAX_IMPORT_SECONDS} s")


def run_examples(python, folder):
    """Run the code of README and tutorial, and the quickstart, in an empty folder."""
    elsewhere = folder / "examples"
    elsewhere.mkdir()
    pages = []
    for page in (ROOT / "README.md", ROOT / "docs" / "tutorial.rst"):
        pages.append(shutil.copy(page, elsewhere))
    run(python, ROOT / "tools" / "run_pages.py", *pages, cwd=elsewhere)
    quickstart = shutil.copy(ROOT / "examples" / "plot_quickstart.py", elsewhere)
    run(python, quickstart, cwd=elsewhere)


def run_tests(python, folder, sdist):
    """Run the tests of the sdist, without its package, against the wheel."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    shutil.rmtree(unpacked / "sklembed")
    run(python, "-m", "pytest", "-n", "2", "tests", cwd=unpacked)


if __name__ == "__main__":
    main()
