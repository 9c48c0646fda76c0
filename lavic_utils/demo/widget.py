"""The panel in notebook 06: controls (ipywidgets), and their picture where nothing drives them."""

from __future__ import annotations

import ipywidgets
from IPython.display import display

from lavic_utils.demo.panel import Panel
from lavic_utils.figures import Kept


class Controls(ipywidgets.interactive):
    """Controls and what they show; for readers without a kernel, the picture they began with."""

    first: Kept

    def _repr_mimebundle_(self, **kwargs) -> dict:
        return {**super()._repr_mimebundle_(**kwargs), **self.first._repr_mimebundle_()}


def show(panel: Panel, domain: str, number: int, swap: tuple[str, str]) -> Controls:
    """Choose a test dialogue, two candidates (1 to 10) that swap pictures, and a tile to hide.

    It begins with dialogue `number` of `domain`, and the pictures of two items (`swap`) exchanged.
    """
    start = panel.example(domain, number)
    one, other = (1 + start.candidates.index(asin) for asin in swap)

    def draw(domain=domain, dialogue=number, swap=one, swap_with=other, hide_of=0, tile=0) -> None:
        case = panel.example(domain, dialogue)
        names = ("nothing", *case.candidates)
        case = case.swap(names[swap], names[swap_with])
        if hide_of:
            case = case.hide(names[hide_of], [tile])
        for who, text in case.dialogue.turns:
            print(f"{who}: {text}")
        display(panel.figure(case))

    places = {"swap": range(1, 11), "swap_with": range(1, 11), "hide_of": range(11)}
    count = min(len(panel.run.dialogues(name, "test")) for name in panel.domains)
    dialogues = range(max(count, number + 1))
    controls = Controls(draw, domain=panel.domains, dialogue=dialogues, tile=range(5), **places)
    controls.first = panel.figure(start.swap(*swap))
    return controls
