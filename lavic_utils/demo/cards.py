"""The page's parts as HTML: the dialogue, ten cards, the item looked at.

Whatever comes from the data is escaped; pictures stand in the page itself: nothing else is loaded.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape

from PIL import Image

from lavic_utils.demo.panel import Case, Panel, tile_name
from lavic_utils.figures import style
from lavic_utils.recommendation import Answer

Answers = Mapping[str, Answer]  # by method


def short(method: str) -> str:
    return method.removeprefix("LaViC ").replace("self-distillation", "self-dist.")


def photo(image: Image.Image | None, alt: str, side: int = 256) -> str:
    if image is None:
        return '<span class="photo">no image</span>'
    small, out = image.copy(), io.BytesIO()
    small.thumbnail((side, side))
    small.save(out, "PNG")
    png = base64.b64encode(out.getvalue()).decode()
    return f'<img class="photo" alt="{escape(alt)}" src="data:image/png;base64,{png}">'


def talk(case: Case) -> str:
    """The dialogue, a paragraph a turn."""
    turns = "".join(f"<p><b>{who}:</b> {escape(text)}</p>" for who, text in case.dialogue.turns)
    return f'<div class="talk">{turns}</div>'


def bars(now: Answers, before: Answers, place: int) -> str:
    """Each method's probability of the candidate at `place`, and what it was before a change."""
    lines = ""
    for method, answer in now.items():
        value, old = f"{answer.probabilities[place]:.2f}", before[method].probabilities[place]
        change = f"<small>{old:.2f} → </small>" if f"{old:.2f}" != value else ""
        width = f"width:{answer.probabilities[place]:.0%}"
        lines += (
            f'<span class="bar"><span>{short(method)}</span> <span>{change}{value}</span><i><span '
            f'style="{width};background:{style.method_colour(method)}"></span></i></span>'
        )
    return lines


def cards(panel: Panel, case: Case, now: Answers, before: Answers, item: str) -> str:
    """The ten candidates with picture, title and probabilities; `item` is the one looked at."""
    found = ""
    for place, asin in enumerate(case.candidates):
        title = panel.run.titles[asin]
        chosen = [short(method) for method, answer in now.items() if answer.recommended == asin]
        badges = {
            f"{'guess' if case.unknown else 'choice'} of {', '.join(chosen)}": bool(chosen),
            "right answer": asin in case.dialogue.gt_items,
            "picture changed": case.changed(asin),
        }
        sure = "" if case.unknown else bars(now, before, place)
        found += (
            f'<button type="button" class="{"chosen" if sure and "LaViC" in chosen else ""}" '
            f'data-item="{asin}" aria-pressed="{"true" if asin == item else "false"}">'
            f"{photo(panel.image(case.picture(asin)), f'picture at {title}')}"
            f"<b>{escape(title)}</b><small>{asin}</small>{sure}"
            f"{''.join(f'<span class=badge>{text}</span>' for text in badges if badges[text])}"
            "</button>"
        )
    return f'<div class="shop" id="answer">{found}</div>'


def closer(panel: Panel, case: Case, item: str) -> str:
    """The item looked at: its picture, its tiles, and what the student says of it."""
    title, said, tiles = panel.run.titles[item], panel.describe(case, item), ""
    for k, tile in enumerate(panel.tiles(case, item)):
        name, gone = tile_name(k), "gone" if k in case.hidden.get(item, ()) else ""
        tiles += f'<figure class="{gone}">{photo(tile, f"{name} of {title}", 56)}{name}</figure>'
    words = f"The student of stage 1 sees: <b>{escape(said)}</b>"
    if not said:
        words = "Every tile is hidden" if tiles else "No picture"
        words += ", so the student of stage 1 has nothing to describe."
    picture = photo(panel.image(case.picture(item)), f"large picture at {title}", 512)
    return (
        f'<div class="item">{picture}<b>{escape(title)}</b> <small>{item}</small>'
        f'<div class="tiles">{tiles}</div><div id="said" aria-live="polite">{words}</div></div>'
    )
