"""What the site needs to be whole without a network: equations as MathML, which browsers draw
themselves, made at build time."""

from __future__ import annotations

import re
from html import escape

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator


def mathml(tex: str, display: str) -> str:
    """MathML of a TeX formula, with the TeX itself as its text for readers that do not speak
    MathML."""
    made = convert(tex.strip(), display=display)
    made = re.sub(r"(<mi>(?:log|exp|max|min)</mi>)", r'\1<mspace width="0.17em"/>', made)
    made = re.sub(
        r'<m[in] mathvariant="double-struck">1</m[in]>',
        "<mi>\N{MATHEMATICAL DOUBLE-STRUCK DIGIT ONE}</mi>",
        made,
    )
    return made.replace("<math ", f'<math alttext="{escape(tex.strip(), quote=True)}" ', 1)


def visit_inline(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_block(self: HTML5Translator, node: nodes.math_block) -> None:
    formula = mathml(node.astext(), "block")
    self.body.append(
        f'<div class="equation" tabindex="0" role="group" aria-label="Equation">{formula}</div>\n'
    )
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_config_value(
        "comments_config", {}, ""
    )  # Jupyter Book sets it for an extension that this site does not load
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
