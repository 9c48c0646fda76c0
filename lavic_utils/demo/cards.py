"""The shop of `demo` as HTML: ten cards and the item looked at. Whatever comes from the data is escaped; pictures are
in the page itself, so that nothing else is asked for."""

import base64
import io
from dataclasses import dataclass
from html import escape

from lavic_utils import style
from lavic_utils.demo.panel import METHODS, Case, Panel
from lavic_utils.recommendation import Answer

SHORT = {m: m.removeprefix("LaViC ").replace("self-distillation", "self-dist.") for m in METHODS}
CSS = f"""
.shop {{display: grid; grid-template-columns: repeat(auto-fill, minmax(min(150px, 46%), 1fr)); gap: 10px}}
.shop button, .item {{background: white; color: {style.INK}; border: 1px solid {style.PALE}; border-radius: 10px; padding: 8px;
  text-align: left; font: inherit; font-size: 13px; line-height: 1.35}}
.shop button {{cursor: pointer; display: flex; flex-direction: column; gap: 3px; position: relative}}
.shop button:hover {{border-color: {style.INK}}}
.shop button:focus-visible {{outline: 3px solid {style.BLUE}; outline-offset: 2px}}
.shop button.chosen {{border-color: {style.VERMILLION}; box-shadow: 0 0 0 3px {style.VERMILLION}}}
.shop button[aria-pressed=true] {{background: #eef4f9}}
.shop .photo, .item .photo {{width: 100%; height: 112px; object-fit: contain; background: #f3f4f6; border-radius: 6px;
  display: flex; align-items: center; justify-content: center; margin: 0}}
.item .photo {{height: 200px}}
.shop button *, .item * {{color: {style.INK}}}  /* white cards on a dark page too */
.shop b {{display: -webkit-box; -webkit-line-clamp: 3; -webkit-box-orient: vertical; overflow: hidden}}
.shop button small, .item small {{color: #4a515a; font-size: 12px}}
.badge {{border: 1px solid {style.PALE}; border-radius: 8px; padding: 0 6px; background: white; font-size: 12px}}
.bar {{display: flex; flex-wrap: wrap; justify-content: space-between; font-size: 12px; margin-top: 2px}}
.bar i {{flex-basis: 100%; height: 7px; border-radius: 4px; background: #e8ebee; overflow: hidden}}
.bar i span {{display: block; height: 100%}}
.tiles {{display: flex; gap: 6px; margin: 6px 0; flex-wrap: wrap}}
.tiles figure {{margin: 0; text-align: center; font-size: 11px}}
.item .tiles img {{width: 52px; height: 52px}}
.tiles .gone {{opacity: .2}}
.talk p {{margin: 4px 0}}
.note {{border-left: 4px solid {style.ORANGE}; padding: 2px 10px; margin: 4px 0}}
.gradio-container input[role=combobox], .gradio-container .secondary-wrap input {{text-overflow: ellipsis; padding-right: 1.8em}}
.verdict {{font-size: 15px; margin: 2px 0 8px}}
"""


@dataclass(frozen=True)
class Visit:
    """What one visitor sees: a case, the answers to it now and as it was asked, and the item looked at."""

    case: Case
    now: dict[str, Answer]
    before: dict[str, Answer]
    item: str


def photo(image, alt: str, side: int = 256) -> str:
    """An image as HTML that needs no other request."""
    if image is None:
        return '<span class="photo">no image</span>'
    image, out = image.copy(), io.BytesIO()
    image.thumbnail((side, side))
    image.save(out, "PNG")
    return f'<img class="photo" alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}">'


def bars(visit: Visit, place: int) -> str:
    lines = []
    for method, found in visit.now.items():
        now, was = found.probabilities[place], visit.before[method].probabilities[place]
        changed = f"<small>{was:.2f} → </small>" if round(now, 2) != round(was, 2) else ""
        lines.append(
            f'<span class="bar"><span>{SHORT[method]}</span> <span>{changed}{now:.2f}</span><i><span style="width:'
            f'{now:.0%};background:{style.method_colour(method)}"></span></i></span>'
        )
    return "".join(lines)


def card(panel: Panel, visit: Visit, place: int) -> str:
    case, asin = visit.case, visit.case.candidates[place]
    title, changed = panel.run.titles[asin], asin in case.shows or case.hidden.get(asin)
    chosen = [SHORT[m] for m, a in visit.now.items() if a.recommended == asin]
    badges = (
        [f"choice of {', '.join(chosen)}"] * bool(chosen)
        + ["right answer"] * (asin in case.dialogue.gt_items)
        + ["picture changed"] * bool(changed)
    )
    return (
        f'<button type="button" data-item="{asin}" class="{"chosen" if "LaViC" in chosen else ""}" '
        f'aria-pressed="{str(asin == visit.item).lower()}">{photo(panel.image(case.picture(asin)), f"picture at {title}")}'
        f"<b>{escape(title)}</b><small>{asin}</small>{bars(visit, place)}"
        f"{''.join(f'<span class=badge>{text}</span>' for text in badges)}</button>"
    )


def closer(panel: Panel, visit: Visit) -> str:
    """The item looked at: its picture, its tiles, and what the student says of it."""
    case, asin = visit.case, visit.item
    title, said = panel.run.titles[asin], panel.describe(case, asin)
    hidden = case.hidden.get(asin, ())
    tiles = "".join(
        f'<figure class="{"gone" if k in hidden else ""}">{photo(tile, f"{name} of {title}", 56)}{name}</figure>'
        for k, (name, tile) in enumerate(
            zip(tile_names(panel, case, asin), panel.tiles(case, asin), strict=True)
        )
    )
    words = (
        f"The student of stage 1 sees: <b>{escape(said)}</b>"
        if said
        else "No picture, so nothing to describe."
    )
    return (
        f'<div class="item">{photo(panel.image(case.picture(asin)), f"large picture at {title}", 512)}<b>{escape(title)}</b> '
        f'<small>{asin}</small><div class="tiles">{tiles}</div><div id="said" aria-live="polite">{words}</div></div>'
    )


def tile_names(panel: Panel, case: Case, asin: str) -> list[str]:
    return [f"crop {k}" if k else "whole" for k in range(len(panel.tiles(case, asin)))]
