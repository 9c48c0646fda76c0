"""The panel as a widget of a notebook (ipywidgets) and as a picture; where there is no kernel the picture alone is shown."""

from __future__ import annotations

import io
import textwrap
from base64 import b64encode
from collections.abc import Mapping
from html import escape

import ipywidgets as w
import matplotlib
from matplotlib.figure import Figure

from lavic_utils import style
from lavic_utils.demo.panel import Case, Panel
from lavic_utils.recommendation import Answer


def figure(
    panel: Panel, case: Case, now: Mapping[str, Answer], before: Mapping[str, Answer] | None = None
) -> Figure:
    """The ten pictures as the case shows them (right answers framed), and under them each method's likelihoods: its choice in
    full colour, what was `before` as a dotted line."""
    names, size = case.candidates, (11, 2.1 + 0.75 * len(now))
    with matplotlib.rc_context({"font.size": 8, "text.color": style.INK}):
        axes = (figure := Figure(size)).subplots(
            len(now) + 1, len(names), height_ratios=[1.6, *[0.8] * len(now)]
        )
        for axis, asin in zip(axes[0], names, strict=True):
            image = panel.image(case.picture(asin))
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel("\n".join(textwrap.wrap(panel.run.titles[asin], 15)[:3]), fontsize=6.5)
            if image is None:
                axis.text(0.5, 0.5, "no image", ha="center", transform=axis.transAxes)
            else:  # every picture in the middle of a square, so that the titles stand in one line
                (width, height), side = image.size, max(image.size) / 2
                axis.imshow(image)
                axis.set(
                    xlim=(width / 2 - side, width / 2 + side),
                    ylim=(height / 2 + side, height / 2 - side),
                )
            if asin in case.shows or case.hidden.get(asin):
                axis.set_title("changed", fontsize=7)
            for spine in axis.spines.values():
                spine.set(visible=asin in case.dialogue.gt_items, color=style.BLUE, linewidth=3)
        for row, (method, found) in zip(axes[1:], now.items(), strict=True):
            for i, (axis, weight) in enumerate(zip(row, found.probabilities, strict=True)):
                chosen = found.recommended == names[i]
                axis.bar(
                    [0], [weight], color=style.method_colour(method), alpha=1 if chosen else 0.35
                )
                axis.text(
                    0,
                    weight + 0.05,
                    f"{weight:.2f}",
                    ha="center",
                    weight="bold" if chosen else "normal",
                    fontsize=7,
                )
                if before:
                    axis.axhline(before[method].probabilities[i], color=style.INK, lw=1, ls=":")
                axis.set(ylim=(0, 1.5), xlim=(-0.6, 0.6), xticks=[], yticks=[])
                axis.spines[["top", "right", "left"]].set_visible(False)
                axis.patch.set_visible(False)  # it would cover the titles
            label = method.removeprefix("LaViC ").replace("self-", "self-\n")
            row[0].set_ylabel(label, rotation=0, ha="right", va="center")
        notes = (
            "framed: a right answer; "
            + ("dotted: before the change; " if before else "")
            + panel.run.profile.tier
        )
        figure.text(0.9, 0.01, notes, ha="right", fontsize=7)
    return figure


def show(panel: Panel, domain: str, number: int = 0, swap: tuple[str, str] | None = None) -> Shown:
    """Choose a domain and a dialogue, swap two items' pictures, hide a tile, and see before and after. It begins with test
    dialogue `number` of `domain`, and with the pictures of the two items of `swap` exchanged."""

    def choose(name: str, *options) -> w.Dropdown:
        return w.Dropdown(
            options=options,
            description=name,
            style={"description_width": "7em"},
            layout=w.Layout(width="24em"),
        )

    where, one, other, item, tile = map(
        choose, ("domain", "swap picture of", "with", "hide of", "tile")
    )
    where.options, where.value = panel.domains, domain
    which = w.BoundedIntText(
        number, 0, 10**6, description="dialogue", style=where.style, layout=where.layout
    )
    columns = [w.VBox(pair) for pair in ((where, which), (one, other), (item, tile))]
    shown = Shown([w.HBox(columns, layout=w.Layout(flex_flow="wrap")), seen := w.HTML()])
    asked: dict = {"drawn": None}

    def ask(_=None) -> None:
        rows = panel.run.dialogues(where.value, "test")
        which.max = len(rows) - 1
        case = asked["case"] = panel.example(where.value, which.value)
        asked["before"] = panel.answer(case)
        names = [("nothing", None), *((f"{panel.run.titles[a]} ({a})", a) for a in case.candidates)]
        for control in (one, other, item):
            control.options, control.value = names, None
        tile.options = [("none", None)]
        draw()

    def offer(_=None) -> None:
        count = len(panel.tiles(asked["case"], item.value)) if item.value else 0
        tile.options = [("none", None), *((f"crop {k}" if k else "whole", k) for k in range(count))]

    def draw(_=None) -> None:
        case = asked["case"]
        if one.value and other.value:
            case = case.swap(one.value, other.value)
        if item.value and tile.value is not None:
            case = case.hide(item.value, [tile.value])
        if case == asked["drawn"]:
            return  # controls that are reset one by one ask for the same again
        asked["drawn"], changed = case, case != asked["case"]
        now = panel.answer(case) if changed else asked["before"]
        png = io.BytesIO()
        figure(panel, case, now, asked["before"] if changed else None).savefig(
            png, format="png", dpi=100, bbox_inches="tight"
        )
        talk = "".join(f"<p><b>{who}:</b> {escape(text)}</p>" for who, text in case.dialogue.turns)
        shown.png, shown.alt = png.getvalue(), panel.sentence(case, now)
        seen.value = (
            f'{talk}<img alt="{escape(shown.alt)}" style="max-width:100%" src="data:image/png;base64,'
            f'{b64encode(shown.png).decode()}"><p>{escape(shown.alt)} <i>{escape(panel.run.profile.tier)}</i></p>'
        )

    ask()
    if swap:
        one.value, other.value = swap
        draw()
    for control, react in (
        (where, ask),
        (which, ask),
        (item, offer),
        (one, draw),
        (other, draw),
        (tile, draw),
    ):
        control.observe(react, "value")
    return shown


class Shown(w.VBox):
    """A box that is also a picture with its alternative text, for readers without a kernel."""

    png, alt = b"", ""

    def _repr_mimebundle_(self, **kwargs) -> dict:
        return {
            **super()._repr_mimebundle_(**kwargs),
            "image/png": b64encode(self.png).decode(),
            "text/plain": self.alt,
        }
