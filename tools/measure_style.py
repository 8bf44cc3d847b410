"""Print the density of the code and the plainness of the prose, with their limits.

Run ``python tools/measure_style.py`` in the root of the repository.
"""

import ast
import io
import re
import token
import tokenize
from pathlib import Path

LONG_LINE = 88
VAGUE_NAMES = set(
    "there found own goes_on seen whole given kept shown wanted known alike both one other "
    "others more fewer held each".split()
)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FREE_RELATIVE = re.compile(r"\bwhat\s+(?:is|was|it|the)\b", re.IGNORECASE)
IMAGE_SYNONYM = re.compile(r"pictures?\b", re.IGNORECASE)
LIMITS = {
    "comprehensions per 100 lines of code": 2,
    "ternaries per 100 lines of code": 1.2,
    f"lines over {LONG_LINE} characters, %": 5,
    "vague names per 1,000 identifiers": 8,
    "free relatives per 10,000 words": 6,
    "lines with 'picture'": 0,
}


def docstrings(tree):
    """Yield the docstring expressions of a module, its classes and its functions."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if (
            isinstance(node, documented)
            and ast.get_docstring(node, clean=False) is not None
        ):
            yield node.body[0].value


def code_line_numbers(source, tree):
    """Return the numbers of lines of code, without blanks, comments and docstrings."""
    documentation = set()
    for docstring in docstrings(tree):
        documentation.update(range(docstring.lineno, docstring.end_lineno + 1))
    ignored = {
        token.COMMENT,
        token.NL,
        token.NEWLINE,
        token.INDENT,
        token.DEDENT,
        token.ENDMARKER,
    }
    code = set()
    for item in tokenize.generate_tokens(io.StringIO(source).readline):
        if item.type not in ignored:
            code.update(range(item.start[0], item.end[0] + 1))
    return code - documentation


def identifiers(source):
    """Return all names in the source, keywords included."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [item.string for item in tokens if item.type == token.NAME]


def measure(package, pages):
    """Count over the modules of a package and the pages of its documentation.

    Parameters
    ----------
    package : list of Path
        Python files.
    pages : list of Path
        Pages in reStructuredText or Markdown.

    Returns
    -------
    figures : dict of str to float
        The figures that `LIMITS` bounds, and "lines of code".
    """
    n_code = n_comprehensions = n_ternaries = n_long = n_lines = 0
    names, prose, image_lines = [], [], 0
    for path in package:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        nodes = list(ast.walk(tree))
        lines = source.splitlines()
        n_lines += len(lines)
        n_long += sum(len(line) > LONG_LINE for line in lines)
        n_code += len(code_line_numbers(source, tree))
        n_comprehensions += sum(isinstance(node, COMPREHENSIONS) for node in nodes)
        n_ternaries += sum(isinstance(node, ast.IfExp) for node in nodes)
        names += identifiers(source)
        prose += [docstring.value for docstring in docstrings(tree)]
        image_lines += sum(bool(IMAGE_SYNONYM.search(line)) for line in lines)
    for path in pages:
        text = path.read_text(encoding="utf-8")
        prose.append(text)
        image_lines += sum(
            bool(IMAGE_SYNONYM.search(line)) for line in text.splitlines()
        )
    n_words = sum(len(text.split()) for text in prose)
    n_free_relatives = sum(len(FREE_RELATIVE.findall(text)) for text in prose)
    n_vague = sum(name in VAGUE_NAMES for name in names)
    values = [
        100 * n_comprehensions / n_code,
        100 * n_ternaries / n_code,
        100 * n_long / n_lines,
        1000 * n_vague / len(names),
        10_000 * n_free_relatives / n_words,
        image_lines,
    ]
    return {"lines of code": n_code} | dict(zip(LIMITS, values, strict=True))


def main():
    """Measure this repository and print a line for each figure."""
    root = Path(__file__).resolve().parents[1]
    package = sorted((root / "sklembed").rglob("*.py"))
    pages = [root / "README.md", *sorted((root / "docs").glob("*.rst"))]
    for folder in ("user_guide", "results", "development"):
        pages += sorted((root / "docs" / folder).rglob("*.rst"))
    for name, value in measure(package, pages).items():
        limit = f"  (at most {LIMITS[name]:g})" if name in LIMITS else ""
        print(f"{name:40s} {value:8.1f}{limit}")


if __name__ == "__main__":
    main()
