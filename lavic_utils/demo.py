"""The page of `make demo`: a small shop on one run, in the browser (Gradio). What it shows is computed in `panel`.

Every visitor's state is a value of their own session (`Visit`); the model answers one at a time. Nothing is loaded from
elsewhere and nothing is reported anywhere.
"""

import base64
import functools
import io
import os
import time
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from lavic_utils import style
from lavic_utils.config import UserError
from lavic_utils.panel import METHODS, Case, Panel, prepare
from lavic_utils.recommendation import Answer
from lavic_utils.runs import Run
from lavic_utils.uploads import FORMATS, MAX_BYTES, read_upload

NEEDS = "the page needs gradio, which is not installed here: make demo, or pip install --no-deps -r requirements-demo.lock"
SHORT = {m: m.removeprefix("LaViC ").replace("self-distillation", "self-dist.") for m in METHODS}
TIER = {"mini run": ": a tiny model on a rendered catalogue; shows how the method works, never what a 7B model scores."}
CLICK = """element.addEventListener('click', event => {
  const card = event.target.closest('button[data-item]');
  if (card) trigger('click', {item: card.dataset.item});
});"""
CSS = f"""
.shop {{display: grid; grid-template-columns: repeat(auto-fill, minmax(148px, 1fr)); gap: 12px}}
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
.shop b, .item b {{color: {style.INK}}}
.shop small, .item small, .badge {{color: #4a515a; font-size: 12px}}
.badge {{border: 1px solid {style.PALE}; border-radius: 8px; padding: 0 6px; background: white; color: {style.INK}}}
.bar {{display: grid; grid-template-columns: 74px 1fr 32px; gap: 4px; align-items: center; font-size: 11.5px}}
.bar i {{display: block; height: 8px; border-radius: 4px; background: #e8ebee; overflow: hidden}}
.bar i span {{display: block; height: 100%}}
.bar em {{font-style: normal; text-align: right}}
.tiles {{display: flex; gap: 6px; margin: 6px 0; flex-wrap: wrap}}
.tiles figure {{margin: 0; text-align: center; font-size: 11px}}
.tiles img {{width: 56px; height: 56px; margin: 0}}
.tiles .gone {{opacity: .2}}
.talk p {{margin: 4px 0}}
.note {{border-left: 4px solid {style.ORANGE}; padding: 2px 10px; margin: 4px 0}}
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
        changed = f"<small>{' ' * 2}was {was:.2f}</small>" if round(now, 2) != round(was, 2) else ""
        lines.append(f'<span class="bar"><span>{SHORT[method]}</span><i><span style="width:{now:.0%};background:'
                     f'{style.method_colour(method)}"></span></i><em>{now:.2f}</em></span>{changed}')
    return "".join(lines)


def card(panel: Panel, visit: Visit, place: int) -> str:
    case, asin = visit.case, visit.case.candidates[place]
    title, changed = panel.run.titles[asin], asin in case.shows or case.hidden.get(asin)
    chosen = [SHORT[m] for m, a in visit.now.items() if a.recommended == asin]
    badges = [f"choice of {', '.join(chosen)}"] * bool(chosen) + ["right answer"] * (asin in case.dialogue.gt_items) \
        + ["picture changed"] * bool(changed)
    return (f'<button type="button" data-item="{asin}" class="{"chosen" if "LaViC" in chosen else ""}" '
            f'aria-pressed="{str(asin == visit.item).lower()}">{photo(panel.image(case.picture(asin)), f"picture at {title}")}'
            f"<b>{escape(title)}</b><small>{asin}</small>{bars(visit, place)}"
            f'{"".join(f"<span class=badge>{text}</span>" for text in badges)}</button>')


def closer(panel: Panel, visit: Visit) -> str:
    """The item looked at: its picture, its tiles, and what the student says of it."""
    case, asin = visit.case, visit.item
    title, said = panel.run.titles[asin], panel.describe(case, asin)
    hidden = case.hidden.get(asin, ())
    tiles = "".join(f'<figure class="{"gone" if k in hidden else ""}">{photo(tile, f"{name} of {title}", 56)}{name}</figure>'
                    for k, (name, tile) in enumerate(zip(tile_names(panel, case, asin), panel.tiles(case, asin), strict=True)))
    words = f"The student of stage 1 sees: <b>{escape(said)}</b>" if said else "No picture, so nothing to describe."
    return (f'<div class="item">{photo(panel.image(case.picture(asin)), f"large picture at {title}", 512)}<b>{escape(title)}</b> '
            f'<small>{asin}</small><div class="tiles">{tiles}</div><div id="said" aria-live="polite">{words}</div></div>')


def tile_names(panel: Panel, case: Case, asin: str) -> list[str]:
    return [f"crop {k}" if k else "whole" for k in range(len(panel.tiles(case, asin)))]


def page(panel: Panel):
    """The Gradio page of a panel (`gradio.Blocks`), not yet served."""
    import gradio as gr

    run = panel.run

    def ask(case: Case) -> Visit:
        answers = panel.answer(case)
        best = answers["LaViC"].recommended
        return Visit(case, answers, answers, best if best in case.candidates else case.candidates[0])

    def again(visit: Visit, case: Case) -> Visit:
        return replace(visit, case=case, now=panel.answer(case))

    def show(visit: Visit, problem: str = "") -> list:
        case = visit.case
        talk = "".join(f"<p><b>{who}:</b> {escape(text)}</p>" for who, text in case.dialogue.turns)
        notes = "".join(f'<p class="note">{escape(text)}</p>' for text in [*[problem] * bool(problem), *case.notes])
        cards = "".join(card(panel, visit, place) for place in range(len(case.candidates)))
        others = [(f"{panel.run.titles[a]} ({a})", a) for a in case.candidates if a != visit.item]
        names = tile_names(panel, case, visit.item)
        verdict = f'<p class="verdict" aria-live="polite">{escape(panel.sentence(case, visit.now))}</p>'
        return [visit, f'<div class="talk">{talk}</div>', f'<div role="status">{notes}</div>',
                f'{verdict}<div class="shop">{cards}</div>', closer(panel, visit), gr.Dropdown(choices=others, value=others[0][1]),
                gr.CheckboxGroup(choices=names, value=[names[k] for k in sorted(case.hidden.get(visit.item, ()))])]

    def attempt(change):
        """The handler of an event: `change` gives the next visit; what it refuses is said, and nothing changes."""
        @functools.wraps(change)
        def handler(visit, *values):
            try:
                return show(change(visit, *values))
            except UserError as error:
                return show(visit, str(error))
        return handler

    def hide(visit: Visit, names: list[str]) -> Visit:
        known = tile_names(panel, visit.case, visit.item)
        return again(visit, visit.case.hide(visit.item, [known.index(name) for name in names if name in known]))

    def look(visit, event: gr.EventData):
        item = event._data.get("item")
        return show(replace(visit, item=item) if item in visit.case.candidates else visit)

    def choices(domain: str):
        found = panel.examples(domain)
        return gr.Dropdown(choices=list(found.items()), value=next(iter(found.values()), 0))

    with gr.Blocks(title="LaViC: try it", analytics_enabled=False, delete_cache=(600, 600)) as blocks:
        state = gr.State(None, time_to_live=3600)
        gr.HTML(f"<h1>LaViC: a recommender that looks</h1><p>Ask for something, see ten candidates and what each of three models "
                f"chooses, then change a picture. <b>{escape(run.profile.tier)}</b>{TIER.get(run.profile.tier, '')}</p>")
        with gr.Row():
            with gr.Column(scale=1, min_width=290):
                domain = gr.Radio(panel.domains, value=panel.domains[0], label="Domain")
                first = panel.examples(panel.domains[0])
                example = gr.Dropdown(list(first.items()), value=next(iter(first.values()), 0), label="Example request")
                text = gr.Textbox(label="Or your own request", lines=2, max_length=2000,
                                  placeholder="i want a red, striped handbag with a black strap.")
                send = gr.Button("Ask", variant="primary")
                talk = gr.HTML()
            with gr.Column(scale=3, min_width=300):
                notes, shop = gr.HTML(), gr.HTML(js_on_load=CLICK, elem_id="shop")
        gr.HTML("<h2>A closer look</h2><p>Click a candidate above, then change its picture.</p>")
        with gr.Row():
            with gr.Column(scale=1, min_width=290):
                item = gr.HTML()
            with gr.Column(scale=1, min_width=290):
                other = gr.Dropdown([], label="Exchange its picture with that of")
                swap = gr.Button("Swap the two pictures")
                tiles = gr.CheckboxGroup([], label="Hide tiles (their [CLS] vectors)")
            with gr.Column(scale=1, min_width=290):
                given = gr.File(label=f"Or show a picture of yours ({', '.join(FORMATS)}; at most {MAX_BYTES // 2**20} MB)",
                                type="binary", height=140)
                back = gr.Button("Put everything back")
        outputs = [state, talk, notes, shop, item, other, tiles]
        quiet = {"outputs": outputs, "api_visibility": "private"}
        by_number = attempt(lambda visit, where, number: ask(panel.example(where, number)))
        blocks.load(by_number, [state, domain, example], **quiet)
        domain.input(choices, domain, example, api_visibility="private").then(by_number, [state, domain, example], **quiet)
        example.input(by_number, [state, domain, example], **quiet)
        typed = attempt(lambda visit, where, words: ask(panel.request(where, words)))
        gr.on([send.click, text.submit], typed, [state, domain, text], **quiet)
        shop.click(look, state, **quiet)
        swap.click(attempt(lambda visit, name: again(visit, visit.case.swap(visit.item, name))), [state, other], **quiet)
        tiles.input(attempt(hide), [state, tiles], **quiet)
        given.upload(attempt(lambda visit, file: again(visit, visit.case.show(visit.item, read_upload(file)))), [state, given],
                     **quiet)
        back.click(attempt(lambda visit: again(visit, visit.case.reset())), state, **quiet)
    return blocks.queue(default_concurrency_limit=1, max_size=64)


def serve(profile: str, seed: int | None, folder: Path | None, host: str, port: int, block: bool = True):
    """Make what is missing, load the models and serve the page until interrupted. UserError where gradio or data are missing,
    or the port is taken."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
    try:
        import gradio as gr
    except ImportError:
        raise UserError(NEEDS) from None
    run, start = Run(profile, seed, folder), time.monotonic()
    prepare(run)
    blocks = page(panel := Panel(run))
    panel.answer(panel.example(panel.domains[0], 0))  # the first visitor waits no longer than the others
    theme = gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")).set(
        button_primary_background_fill=style.BLUE, button_primary_text_color="white")
    try:
        _, url, _ = blocks.launch(server_name=host, server_port=port, share=False, inbrowser=False, quiet=True, theme=theme,
                                    css=CSS, footer_links=[], max_file_size=MAX_BYTES, ssr_mode=False, pwa=False,
                                    enable_monitoring=False, prevent_thread_lock=True)
    except OSError as error:
        raise UserError(f"cannot serve on {host}, port {port} ({error}); give another --port") from None
    print(f"ready in {time.monotonic() - start:.1f} s: {url}  (Ctrl-C ends it)", flush=True)
    return blocks.block_thread() if block else blocks
