"""Write llms.txt: the pages of the documentation with their first paragraphs, for models.

The format is that of https://llmstxt.org: a title, a summary, and a list of links for each part
of the table of contents.
"""

from pathlib import Path
from urllib.parse import urljoin

from docutils import nodes


def first_paragraph(doctree):
    """Return the first paragraph outside of lists, tables and directives; "" without one."""
    for paragraph in doctree.findall(nodes.paragraph):
        if isinstance(paragraph.parent, nodes.section):
            return " ".join(paragraph.astext().split())
    return ""


def write_llms(app, exception):
    """Write the file into the directory of the built pages."""
    if exception or app.builder.name != "html":
        return
    env, root = app.env, app.config.root_doc

    def link(page):
        url = urljoin(app.config.html_baseurl, app.builder.get_target_uri(page))
        text = first_paragraph(env.get_doctree(page))
        return f"- [{env.titles[page].astext()}]({url})" + (f": {text}" if text else "")

    lines = [
        f"# {app.config.project}",
        "",
        f"> {first_paragraph(env.get_doctree(root))}",
    ]
    single_pages = []
    for page in env.toctree_includes.get(root, []):
        pages = env.toctree_includes.get(page, [])
        if pages:
            lines += ["", f"## {env.titles[page].astext()}", "", *map(link, pages)]
        else:
            single_pages.append(page)
    lines[3:3] = ["", "## Start", "", *map(link, single_pages)] if single_pages else []
    Path(app.outdir, "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def setup(app):
    """Connect the extension to Sphinx."""
    app.connect("build-finished", write_llms)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
