"""Check that the search of the built documentation leads to the right page first.

The script runs Sphinx's own search, in Node.js, on the index of the built pages, and prints the
first results of each query::

    make docs
    python tools/check_search.py docs/_build/html
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

# The page that must come first for each query.
PAGES = {
    "install": "install",
    "GPU": "user_guide/encode_faster",
    "regression": "user_guide/regression",
    "missing": "user_guide/missing",
    "production": "user_guide/serve",
    "save": "user_guide/serve",
    "skrub": "user_guide/interoperate",
    "groups": "user_guide/evaluate",
    "cost": "user_guide/evaluate",
    "explain": "user_guide/explain",
}
SCRIPTS = (
    "_static/documentation_options.js",
    "_static/language_data.js",
    "_static/searchtools.js",
    "searchindex.js",
)
# The parts of a browser that the scripts need, before them; the queries, after them.
BROWSER = """
const nothing = () => null;
const window = globalThis, SPHINX_HIGHLIGHT_ENABLED = false;
const document = {getElementById: nothing, addEventListener: nothing};
const _ = (text) => text, _ready = nothing;
"""
SEARCH = """
const results = {};
for (const query of %s)
  results[query] = Search._performSearch(...Search._parseQuery(query)).reverse();
console.log(JSON.stringify(results));
"""


def search(html, queries):
    """Search built documentation.

    Parameters
    ----------
    html : Path
        The directory of the built pages.
    queries : list of str
        The queries.

    Returns
    -------
    results : dict of str to list
        For each query the results, the best first: page, title, anchor, description,
        score, file and kind.
    """
    parts = [BROWSER]
    for name in SCRIPTS:
        parts.append((html / name).read_text(encoding="utf-8"))
    parts.append(SEARCH % json.dumps(queries))
    node = subprocess.run(
        ["node"], input="\n".join(parts), capture_output=True, text=True, check=True
    )
    return json.loads(node.stdout)


def main():
    """Print the first results of each query; fail if a page does not come first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("html", type=Path, help="directory of the built documentation")
    parser.add_argument("--results", type=int, default=3, help="number to print")
    args = parser.parse_args()
    if shutil.which("node") is None:
        sys.exit("Node.js is needed: install it, for example by apt install nodejs.")
    n_wrong = 0
    for query, results in search(args.html, list(PAGES)).items():
        is_right = bool(results) and results[0][0] == PAGES[query]
        n_wrong += not is_right
        print(f"{query}: {'right' if is_right else f'not {PAGES[query]}'}")
        for page, title, anchor, _, score, *_ in results[: args.results]:
            print(f"    {score:4} {page}{anchor}  {title}")
        if not is_right:
            print(f"    Add '.. index:: ! {query}' below the title of {PAGES[query]}.")
    sys.exit(f"{n_wrong} of {len(PAGES)} queries lead elsewhere." if n_wrong else 0)


if __name__ == "__main__":
    main()
