"""Run the Python code of pages and write what it prints below it.

``python tools/run_pages.py docs/tutorial.rst docs/index.rst README.md`` runs the code blocks of
each page in their order, in one namespace and in a temporary directory. The block of text that
follows a code block is replaced by its output. ``--check`` changes no page and fails if an output
differs. ``tests/test_pages.py`` runs the same code on fewer rows.
"""

import argparse
import contextlib
import io
import os
import re
import sys
import tempfile
import textwrap
from pathlib import Path

# A block of code, and a block of text if nothing but a blank line is between them.
MARKDOWN = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)
REST = re.compile(
    r"^\.\. code-block:: python\n(?: {3}:caption: (?P<caption>.*)\n)?\n(?P<code>(?:(?: {3}.*)?\n)+)"
    r"(?:\.\. code-block:: text\n\n(?P<output>(?:(?: {3}.*)?\n)+))?",
    re.MULTILINE,
)


def read_blocks(page):
    """Return the pattern matches of the code blocks of a page, and its text."""
    text = page.read_text(encoding="utf-8")
    pattern = MARKDOWN if page.suffix == ".md" else REST
    return list(pattern.finditer(text)), text


def run_block(block, names, page):
    """Run the code of one block, and return what it prints."""
    code = textwrap.dedent(block["code"])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(page), "exec"), names)
    return printed.getvalue().rstrip()


def write_outputs(page):
    """Return the text of a page with the outputs of its code, run in a new directory."""
    blocks, text = read_blocks(page)
    indent = "" if page.suffix == ".md" else "   "
    names = {"__name__": "__main__"}
    pieces, end = [], 0
    for block in blocks:
        output = run_block(block, names, page)
        if block["output"] is None:
            if output:
                raise SystemExit(f"{page}: no block of text follows\n{block['code']}")
            continue
        pieces.append(text[end : block.start("output")])
        pieces.append(textwrap.indent(output, indent) + "\n")
        if page.suffix != ".md":
            pieces.append("\n")  # ends an indented block
        end = block.end("output")
    return "".join([*pieces, text[end:]])


def main():
    """Write or check the outputs of the pages that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale = []
    for page in [page.resolve() for page in options.pages]:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            text = write_outputs(page)
        if text == page.read_text(encoding="utf-8"):
            continue
        stale.append(str(page))
        if not options.check:
            page.write_text(text, encoding="utf-8")
    print("\n".join(f"outputs differ: {os.path.relpath(page)}" for page in stale))
    sys.exit(bool(stale and options.check))


if __name__ == "__main__":
    main()
