"""Sphinx's settings for the slides (make slides): reveal.js, which the extension brings along."""

project = "LaViC in 90 minutes"
extensions = ["myst_parser", "sphinx_revealjs"]
suppress_warnings = ["myst.header"]
revealjs_style_theme = "white"
revealjs_static_path = ["_static"]
revealjs_css_files = ["slides.css"]
revealjs_script_conf = {"hash": True, "slideNumber": True, "width": 1280, "height": 720}
revealjs_script_plugins = [{"name": "RevealNotes", "src": "revealjs/plugin/notes/notes.js"}]
