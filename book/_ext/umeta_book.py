"""The book's own Sphinx extension.

It sends the Colab button to the generated notebooks (Colab cannot open a Markdown chapter), writes `labels.json`
(the number and address of everything that can be referred to, for `tools/write_notebooks.py`), gives the bibliography
author-year labels, and leaves out of the site what no page needs.
"""

import json
import re
import shutil
from pathlib import Path

from pybtex.plugin import register_plugin
from pybtex.style.formatting.plain import Style as PlainStyle
from pybtex.style.labels import BaseLabelStyle


class AuthorYearLabels(BaseLabelStyle):
    """`Snell et al., 2017` instead of `SSZ17`: the label in the list reads like the citation in the text."""

    def format_labels(self, entries):
        for entry in entries:
            names = [" ".join(person.last_names) for person in entry.persons.get("author", [])]
            who = names[0] if len(names) == 1 else " and ".join(names) if len(names) == 2 else f"{names[0]} et al."
            yield f"{who}, {entry.fields['year']}"


class UmetaStyle(PlainStyle):
    default_label_style = AuthorYearLabels


def colab_links(app, pagename, templatename, context, doctree):
    """Point the theme's Colab button at `notebooks/<chapter>.ipynb`."""

    def rewrite(buttons):
        for button in buttons:
            if "colab.research.google.com" in str(button.get("url", "")):
                repository, _, path = button["url"].partition("/blob/")
                branch = path.split("/")[0]
                button["url"] = f"{repository}/blob/{branch}/notebooks/{Path(pagename).name}.ipynb"
            rewrite(button.get("buttons", []))

    rewrite(context.get("header_buttons", []))


def scripts_once(app, pagename, templatename, context, doctree):
    """Keep one of equal scripts: Sphinx takes inline ones twice (without a name and with an empty one).

    Constants of sphinx-thebe that are declared again are an error in the browser's console.
    """
    unique = {(script.filename or "", script.attributes.get("body")): script for script in context["script_files"]}
    context["script_files"] = list(unique.values())


def repository_links(app, docname, source):
    """Links to Markdown files outside the book lead to the repository; Sphinx would look for a page of the book."""
    options = app.config.html_theme_options
    head = f"{options['repository_url']}/blob/{options['repository_branch']}/"
    source[0] = re.sub(r"\]\(\.\./([^)\s]+\.md)\)", rf"]({head}\1)", source[0])


def label_map(app) -> dict:
    """label -> {text, kind, number, url} for sections, figures, tables, equations, theorems and exercises."""
    env, labels = app.env, {}
    standard, math = env.get_domain("std"), env.get_domain("math")

    def address(doc, anchor):
        return app.builder.get_target_uri(doc) + (f"#{anchor}" if anchor else "")

    def number(doc, kind, anchor):
        return ".".join(map(str, env.toc_fignumbers.get(doc, {}).get(kind, {}).get(anchor, ())))

    for label, (doc, anchor, title) in standard.labels.items():
        if doc not in env.found_docs or "/" in label:
            continue  # Sphinx's own pages, and the labels that it makes up
        labels[label] = {"text": str(title), "url": address(doc, anchor)}
        node = env.get_doctree(doc).ids.get(anchor)
        if node is not None and node.tagname == "section":
            numbers = env.toc_secnumbers.get(doc, {})
            found = numbers.get(f"#{node['ids'][0]}") or numbers.get("", ())
            labels[label] |= {"kind": "section", "number": ".".join(map(str, found))}
    for label, (doc, anchor) in standard.anonlabels.items():
        for kind in env.toc_fignumbers.get(doc, {}):
            if found := number(doc, kind, anchor):
                labels.setdefault(label, {}).update(kind=kind, number=found, url=address(doc, anchor))
    for label, (doc, count) in math.equations.items():
        anchor = f"equation-{label}"
        found = number(doc, "displaymath", anchor) or str(count)
        labels[label] = {"kind": "equation", "number": found, "url": address(doc, anchor)}
    for label, proof in getattr(env, "proof_list", {}).items():
        doc, kind = proof["docname"], proof["realtype"]
        found = number(doc, proof["countertype"], label) or number(doc, kind, label)
        labels[label] = {"kind": kind, "number": found, "url": address(doc, label)}
    return labels


def write_labels(app, exception):
    if exception is None and app.builder.name == "html":
        text = json.dumps(label_map(app), indent=1, sort_keys=True)
        Path(app.outdir, "labels.json").write_text(text + "\n")


def prune_mathjax(app, exception):
    """Keep the one MathJax file that pages load and its fonts: 2 MB instead of 24."""
    if exception is not None or app.builder.name != "html":
        return
    for main in Path(app.outdir, "_static").rglob("tex-chtml.js"):
        kept = main.parent / "output" / "chtml" / "fonts"
        for path in sorted(main.parent.rglob("*"), reverse=True):
            if path in (main, kept) or kept in path.parents or path in kept.parents:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def setup(app):
    register_plugin("pybtex.style.formatting", "umeta", UmetaStyle)
    app.add_css_file("umeta.css")
    app.add_js_file("umeta.js", loading_method="defer")
    app.connect("source-read", repository_links)
    app.connect("html-page-context", colab_links, priority=900)
    app.connect("html-page-context", scripts_once, priority=950)
    app.connect("build-finished", write_labels)
    app.connect("build-finished", prune_mathjax, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
