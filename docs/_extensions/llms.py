"""Write llms.txt: the pages of the documentation with their first sentences, for models.

The format is that of https://llmstxt.org: a title, a summary, and a list of links for each part
of the table of contents.
"""

from pathlib import Path

from docutils import nodes
from sphinx.addnodes import desc_content


def first_paragraph(doctree):
    """Return the first paragraph of a page or of the object that it documents."""
    for paragraph in doctree.findall(nodes.paragraph):
        if isinstance(paragraph.parent, nodes.section | desc_content):
            return " ".join(paragraph.astext().split())
    return ""


def link(app, page):
    """Return a line with the title, the address and the first paragraph of a page."""
    title = app.env.titles[page].astext()
    url = app.config.html_baseurl + app.builder.get_target_uri(page)
    text = first_paragraph(app.env.get_doctree(page))
    return f"- [{title}]({url}): {text}".rstrip(": ")


def write_llms(app, exception):
    """Write the file into the directory of the built pages."""
    if exception or app.builder.name != "html":
        return
    root = app.config.root_doc
    summary = first_paragraph(app.env.get_doctree(root))
    start, parts = [], []
    for page in app.env.toctree_includes.get(root, []):
        pages = app.env.toctree_includes.get(page, [])
        if pages:
            parts += ["", f"## {app.env.titles[page].astext()}", ""]
            parts += [link(app, subpage) for subpage in pages]
        else:
            start.append(link(app, page))
    if start:
        start = ["", "## Start", "", *start]
    lines = [f"# {app.config.project}", "", f"> {summary}", *start, *parts]
    Path(app.outdir, "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def setup(app):
    """Connect the extension to Sphinx."""
    app.connect("build-finished", write_llms)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
