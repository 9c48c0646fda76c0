"""The panel in notebook 06: controls (ipywidgets), and their picture where nothing drives them."""

from __future__ import annotations

import ipywidgets as w
from IPython.display import display

from lavic_utils import figures
from lavic_utils.demo.panel import Case, Panel, tile_name


def picture(panel: Panel, case: Case) -> figures.Kept:
    """A case as `figures.case_figure` draws it, beside what was answered before it was changed."""
    changed = [asin for asin in case.candidates if case.changed(asin)]
    now, before = panel.answer(case), panel.answer(case.reset()) if changed else {}
    images = {asin: panel.image(case.picture(asin)) for asin in case.candidates}
    fig = figures.case_figure(
        panel.run,
        case.dialogue,
        {method: vars(answer) for method, answer in now.items()},
        {method: vars(answer) for method, answer in before.items()},
        images,
        changed,
    )
    words = f"framed: a right answer; {'dotted: before the change; ' if changed else ''}"
    fig.text(0.9, 0.01, words + panel.run.profile.tier, ha="right", fontsize=7)
    return figures.shown(fig, panel.sentence(case, now))


class Controls(w.interactive):
    """Controls and what they show; for readers without a kernel, the picture they began with."""

    first: figures.Kept

    def _repr_mimebundle_(self, **kwargs) -> dict:
        return {**super()._repr_mimebundle_(**kwargs), **self.first._repr_mimebundle_()}


def show(panel: Panel, domain: str, number: int, swap: tuple[str, str]) -> Controls:
    """Choose a test dialogue, two candidates (1 to 10) that swap pictures, and a tile to hide.

    It begins with dialogue `number` of `domain`, and the pictures of two items (`swap`) exchanged.
    """

    def draw(domain: str, dialogue: int, swap, swap_with, hide_of, tile: int) -> None:
        case = panel.example(domain, dialogue)
        names = case.candidates
        if swap is not None and swap_with is not None:
            case = case.swap(names[swap], names[swap_with])
        if hide_of is not None:
            case = case.hide(names[hide_of], [tile])
        for who, text in case.dialogue.turns:
            print(f"{who}: {text}")
        display(picture(panel, case))

    start = panel.example(domain, number)
    one, other = (start.candidates.index(asin) for asin in swap)
    fewest = min(len(panel.run.dialogues(name, "test")) for name in panel.domains)
    places = [("none", None), *((str(k + 1), k) for k in range(len(start.candidates)))]
    controls = Controls(
        draw,
        domain=w.Dropdown(options=panel.domains, value=domain),
        dialogue=w.BoundedIntText(number, 0, max(number, fewest - 1)),
        swap=w.Dropdown(options=places, value=one),
        swap_with=w.Dropdown(options=places, value=other),
        hide_of=places,
        tile=[(tile_name(k), k) for k in range(5)],
    )
    controls.first = picture(panel, start.swap(*swap))
    return controls
