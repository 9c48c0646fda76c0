"""The page of `make demo`: a small shop on one run, in the browser (Gradio).

What it shows is computed in `panel`. Every visitor's state is a value of their own session
(`Visit`); the model answers one at a time. Nothing is loaded from elsewhere or reported anywhere.
"""

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from lavic_utils.config import ROOT, UserError
from lavic_utils.demo import cards
from lavic_utils.demo.panel import Case, Panel, prepare, tile_name
from lavic_utils.demo.uploads import FORMATS, MAX_BYTES, read_upload
from lavic_utils.figures import style
from lavic_utils.hub import check_proxies

NEEDS = "the page needs gradio, which is not installed here: "
LOCKED = "make demo, or pip install --no-deps -r requirements-demo.lock"
UNLOCKED = "python -m pip install 'gradio>=6,<7'"  # a wheel has no lock
INTRO = """<h1>LaViC: a recommender that looks</h1><p>Ask for something, see ten candidates and what
each of three models chooses, then change a picture. <b>{tier}</b></p>"""
MINI = """mini run: a tiny model on a rendered catalogue; shows how the method works, never what a
7B model scores."""
PALETTE = f""":root {{--vermillion: {style.VERMILLION}; --blue: {style.BLUE};
  --orange: {style.ORANGE}}}"""
BLIND = "LaViC w/o images"  # what the titles alone suggest
CLICK = """element.addEventListener('click', event => {
  const card = event.target.closest('button[data-item]');
  if (!card) return;
  trigger('click', {item: card.dataset.item});
  if (window.innerWidth < 700)
    document.getElementById('closer').scrollIntoView({behavior: 'smooth'});
});"""

# What stands above a group of choices is its name to screen readers too.
NAMES = """() => document.querySelectorAll('fieldset').forEach(group => {
  group.ariaLabel = group.querySelector('[data-testid=block-info]').innerText;
})"""
# A choice is sent as text, with what was on the page when it was made: the list may be another by
# the time it is read.
PACKED = "(visit, seen, value) => [visit, JSON.stringify([seen, value]), []]"
NEAR = "() => document.getElementById('%s').scrollIntoView({block: 'nearest'})"


@dataclass(frozen=True)
class Visit:
    """What a visitor sees: a case, the answers now and as it was asked, and the item looked at."""

    case: Case
    now: cards.Answers
    before: cards.Answers
    item: str

    @property
    def seen(self) -> str:
        """What a change of a picture refers to: request, candidates, and the item looked at."""
        return " ".join([self.case.dialogue.context, *self.case.candidates, self.item])


def begin(panel: Panel, case: Case) -> Visit:
    """A new request, answered; looked at is LaViC's choice."""
    answers = panel.answer(case)
    if cut := answers["LaViC"].dropped_dialogue_tokens:
        if not case.dialogue.gt_items:  # typed
            raise UserError(f"not asked: {cut} tokens longer than the model reads; say it shorter")
        note = f"The model does not see the first {cut} tokens of this dialogue: it is too long."
        case = replace(case, notes=(*case.notes, note))
    best = answers["LaViC"].recommended
    item = best if best in case.candidates else case.candidates[0]
    return Visit(case, answers, answers, item)


def said(lines: Iterable[str], verdict: str, place: str) -> str:
    """What was refused or is to be known, then the answers in words: beside the control that caused
    them, and read aloud."""
    notes = "".join(f'<p class="note">{escape(text)}</p>' for text in lines if text)
    return f'<div id="{place}" role="status">{notes}<p class="verdict">{escape(verdict)}</p></div>'


def page(panel: Panel):
    """The Gradio page of a panel (`gradio.Blocks`), not yet served."""
    import gradio as gr

    def show(visit: Visit, refused: str = "", new: bool = False) -> list:
        """The values of `outputs`; `refused`: why a request (`new`) or a change is not taken."""
        case, item = visit.case, visit.item
        asked, now = (panel.sentence(case, answers) for answers in (visit.before, visit.now))
        lines = [refused if new else "", *case.notes]
        others = [(f"{panel.run.titles[a]} ({a})", a) for a in case.candidates if a != item]
        likely = dict(zip(case.candidates, visit.before[BLIND].probabilities, strict=True))
        rival = max((asin for _, asin in others), key=likely.get)  # with it a swap shows most
        tiles = [(tile_name(k), k) for k in range(len(panel.tiles(case, item)))]
        return [
            visit,
            said(lines, asked, "asked"),
            cards.talk(case),
            cards.cards(panel, case, visit.now, visit.before, item),
            cards.closer(panel, case, item),
            gr.Dropdown(choices=others, value=rival),
            gr.CheckboxGroup(choices=tiles, value=sorted(case.hidden.get(item, ()))),
            said([] if new else [refused], f"Now {now}" if case.altered() else "", "changed"),
            visit.seen,
        ]

    def first_example(domain: str) -> int:
        return next(iter(panel.examples(domain).values()), 0)

    def examples(domain: str) -> gr.Dropdown:
        choices, first = list(panel.examples(domain).items()), first_example(domain)
        return gr.Dropdown(choices=choices, value=first, label="Example request")

    start = "fashion" if "fashion" in panel.domains else panel.domains[0]
    first = begin(panel, panel.example(start, first_example(start)))
    tier, how = panel.run.profile.tier, {"analytics_enabled": False, "delete_cache": (600, 600)}
    with gr.Blocks(title="LaViC: try it", **how) as blocks:
        state = gr.State(first, time_to_live=3600)  # every session begins with a copy
        gr.HTML(INTRO.format(tier=MINI if tier == "mini run" else escape(tier)))
        with gr.Row():
            with gr.Column(scale=1, min_width=290):
                domain = gr.Radio(panel.domains, value=start, label="Domain")
                example = examples(start)
                hint = "i want a red, striped handbag with a black strap."
                text = gr.Textbox(label="Or your own request", max_length=2000, placeholder=hint)
                send = gr.Button("Ask", variant="primary")
                asked, talk = gr.HTML(), gr.HTML()
            with gr.Column(scale=3, min_width=300):
                answer = gr.HTML(js_on_load=CLICK, elem_id="shop")
        about = "<p>Click a candidate above, then change its picture.</p>"
        gr.HTML(f"<h2>A closer look</h2>{about}", elem_id="closer")
        with gr.Row():
            with gr.Column(scale=1, min_width=290):
                item = gr.HTML()
            with gr.Column(scale=2, min_width=290):
                other = gr.Dropdown([], label="Exchange its picture with that of")
                swap = gr.Button("Swap the two pictures")
                tiles = gr.CheckboxGroup([], label="Hide tiles (their [CLS] vectors)")
                given = gr.UploadButton("Show a picture of your own", type="binary")
                taken = f"{', '.join(FORMATS)}; at most {MAX_BYTES // 2**20} MB"
                gr.HTML(f"<small>{taken}; deleted here within 20 minutes.</small>")
                back = gr.Button("Put everything back")
                changed, seen = gr.HTML(), gr.Textbox(visible="hidden")

        outputs = [state, asked, talk, answer, item, other, tiles, changed, seen]
        private = {"api_visibility": "private"}
        alone = {"outputs": outputs, "concurrency_id": "model", "concurrency_limit": 1, **private}

        def on(event: Callable, ask: Callable[..., Case], *inputs, again="always_last", js=None):
            """Change the case to what `ask(visit, *inputs)` gives; what it refuses is said instead.

            `again`: what becomes of a click while the one before is still answered. A click on what
            another request has replaced by then changes nothing. The control it comes from is not
            set: a visitor may already have moved it on.
            """

            def handler(visit: Visit, seen: str, *values) -> list:
                if js:
                    seen, *values = json.loads(seen)
                if seen != visit.seen:
                    return show(visit)
                try:
                    case = ask(visit, *values)
                    after = show(replace(visit, case=case, now=panel.answer(case)))
                except UserError as error:
                    after = show(visit, str(error))
                return [
                    gr.skip() if part in inputs else value
                    for part, value in zip(outputs, after, strict=True)
                ]

            done = event(handler, [state, seen, *inputs], trigger_mode=again, js=js, **alone)
            done.then(None, js=NEAR % "changed")

        def on_request(events: list[Callable], ask: Callable[..., Case], *inputs, again="multiple"):
            """Begin with the case that `ask(*inputs)` gives; what it refuses is said instead."""

            def handler(visit: Visit, *values) -> list:
                try:
                    return show(begin(panel, ask(*values)), new=True)
                except UserError as error:
                    return show(visit, str(error), new=True)

            done = gr.on(events, handler, [state, *inputs], trigger_mode=again, **alone)
            done.then(None, js=NEAR % "asked")

        def look(visit: Visit, event: gr.EventData) -> list:  # gradio reads this annotation
            clicked = event._data.get("item")
            return show(replace(visit, item=clicked) if clicked in visit.case.candidates else visit)

        blocks.load(None, js=NAMES)
        blocks.load(show, state, **alone)
        answer.click(look, state, trigger_mode="multiple", **alone)  # each click says its item
        domain.input(examples, domain, example, trigger_mode="multiple", **private)
        on_request([domain.input], lambda name: panel.example(name, first_example(name)), domain)
        on_request([example.input], panel.example, domain, example)
        # a key held down is Enter many times
        on_request([send.click, text.submit], panel.request, domain, text, again="always_last")

        def swapped(visit: Visit, name: str) -> Case:
            return visit.case.swap(visit.item, name)

        on(swap.click, swapped, other, again="once", js=PACKED)
        on(tiles.input, lambda visit, hidden: visit.case.hide(visit.item, hidden), tiles, js=PACKED)
        on(given.upload, lambda visit, file: visit.case.show(visit.item, read_upload(file)), given)
        on(back.click, lambda visit: visit.case.reset())
    return blocks.queue(max_size=64)


def serve(
    profile: str, seed: int | None, folder: Path | None, host: str, port: int, block: bool = True
):
    """Make what is missing, load the models and serve the page until interrupted.

    UserError where gradio or data are missing, or the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    check_proxies()  # gradio makes its clients when it is imported
    # and asks its own page whether it is there: not through a proxy
    left_out = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    os.environ["no_proxy"] = f"{left_out},{host},localhost"
    try:
        import gradio as gr
    except ImportError:
        checkout = (ROOT / "requirements-demo.lock").is_file()
        raise UserError(NEEDS + (LOCKED if checkout else UNLOCKED)) from None
    from lavic_utils.experiment import Experiment

    start, run = time.monotonic(), Experiment(profile, seed, folder).prepare()
    prepare(run)
    blocks = page(Panel(run))
    fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
    theme = gr.themes.Default(primary_hue="blue", **fonts)  # no font is loaded from elsewhere
    theme.set(button_primary_background_fill=style.BLUE, button_primary_text_color="white")
    how = {"theme": theme, "css": PALETTE, "css_paths": Path(__file__).with_name("page.css")}
    how |= {"share": False, "quiet": True, "ssr_mode": False, "enable_monitoring": False}
    # far above ours: what gradio refuses, it says in a corner, what we refuse, beside the button
    how |= {"prevent_thread_lock": True, "max_file_size": 5 * MAX_BYTES, "footer_links": []}
    try:
        _, url, _ = blocks.launch(server_name=host, server_port=port, **how)
    except OSError:
        why = f"cannot serve on {host}, port {port}: taken, or not of this machine"
        raise UserError(f"{why}; give another --port") from None
    print(f"ready in {time.monotonic() - start:.1f} s: {url}  (Ctrl-C ends it)", flush=True)
    return blocks.block_thread() if block else blocks
