"""The page of `make demo`: a small shop on one run, in the browser (Gradio). What it shows is computed in `panel`.

Every visitor's state is a value of their own session (`Visit`); the model answers one at a time. Nothing is loaded from
elsewhere and nothing is reported anywhere.
"""

import functools
import os
import time
from dataclasses import replace
from html import escape
from pathlib import Path

from lavic_utils import style
from lavic_utils.config import UserError
from lavic_utils.demo.cards import CSS, Visit, card, closer, tile_names
from lavic_utils.demo.panel import Case, Panel, prepare
from lavic_utils.demo.uploads import FORMATS, MAX_BYTES, read_upload
from lavic_utils.experiment import Experiment

NEEDS = "the page needs gradio, which is not installed here: make demo, or pip install --no-deps -r requirements-demo.lock"
TIER = {
    "mini run": ": a tiny model on a rendered catalogue; shows how the method works, never what a 7B model scores."
}
CLICK = """element.addEventListener('click', event => {
  const card = event.target.closest('button[data-item]');
  if (!card) return;
  trigger('click', {item: card.dataset.item});
  if (window.innerWidth < 700) document.getElementById('closer').scrollIntoView({behavior: 'smooth'});
});"""


def page(panel: Panel):
    """The Gradio page of a panel (`gradio.Blocks`), not yet served."""
    import gradio as gr

    run = panel.run

    def ask(case: Case) -> Visit:
        answers = panel.answer(case)
        best = answers["LaViC"].recommended
        return Visit(
            case, answers, answers, best if best in case.candidates else case.candidates[0]
        )

    def again(visit: Visit, case: Case) -> Visit:
        return replace(visit, case=case, now=panel.answer(case))

    def show(visit: Visit, problem: str = "") -> list:
        case = visit.case
        talk = "".join(f"<p><b>{who}:</b> {escape(text)}</p>" for who, text in case.dialogue.turns)
        notes = "".join(
            f'<p class="note">{escape(text)}</p>'
            for text in [*[problem] * bool(problem), *case.notes]
        )
        cards = "".join(card(panel, visit, place) for place in range(len(case.candidates)))
        others = [(f"{panel.run.titles[a]} ({a})", a) for a in case.candidates if a != visit.item]
        names = tile_names(panel, case, visit.item)
        kept = [names[k] for k in sorted(case.hidden.get(visit.item, ())) if k < len(names)]
        verdict = (
            f'<p class="verdict" aria-live="polite">{escape(panel.sentence(case, visit.now))}</p>'
        )
        titles = visit.before[
            "LaViC w/o images"
        ].probabilities  # a swap with what the titles alone suggest shows most
        rival = max((a for _, a in others), key=lambda a: titles[case.candidates.index(a)])
        shop = f'<div id="answer"><div role="status">{notes}</div>{verdict}<div class="shop">{cards}</div></div>'
        return [
            visit,
            f'<div class="talk">{talk}</div>',
            shop,
            closer(panel, visit),
            gr.Dropdown(choices=others, value=rival),
            gr.CheckboxGroup(choices=names, value=kept),
        ]

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
        return again(
            visit,
            visit.case.hide(visit.item, [known.index(name) for name in names if name in known]),
        )

    def look(visit, event: gr.EventData):
        item = event._data.get("item")
        return show(replace(visit, item=item) if item in visit.case.candidates else visit)

    def choices(domain: str) -> dict:
        found = panel.examples(domain)
        return {"choices": list(found.items()), "value": next(iter(found.values()), 0)}

    start = "fashion" if "fashion" in panel.domains else panel.domains[0]
    first = ask(panel.example(start, choices(start)["value"]))

    with gr.Blocks(
        title="LaViC: try it", analytics_enabled=False, delete_cache=(600, 600)
    ) as blocks:
        state = gr.State(first, time_to_live=3600)  # every session begins with a copy
        gr.HTML(
            f"<h1>LaViC: a recommender that looks</h1><p>Ask for something, see ten candidates and what each of three models "
            f"chooses, then change a picture. <b>{escape(run.profile.tier)}</b>{TIER.get(run.profile.tier, '')}</p>"
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=290):
                domain = gr.Radio(panel.domains, value=start, label="Domain")
                example = gr.Dropdown(**choices(start), label="Example request")
                text = gr.Textbox(
                    label="Or your own request",
                    lines=2,
                    max_length=2000,
                    placeholder="i want a red, striped handbag with a black strap.",
                )
                send = gr.Button("Ask", variant="primary")
                talk = gr.HTML()
            with gr.Column(scale=3, min_width=300):
                shop = gr.HTML(js_on_load=CLICK, elem_id="shop")
        gr.HTML(
            "<h2>A closer look</h2><p>Click a candidate above, then change its picture.</p>",
            elem_id="closer",
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=290):
                item = gr.HTML()
            with gr.Column(scale=1, min_width=290):
                other = gr.Dropdown([], label="Exchange its picture with that of")
                swap = gr.Button("Swap the two pictures")
                tiles = gr.CheckboxGroup([], label="Hide tiles (their [CLS] vectors)")
            with gr.Column(scale=1, min_width=290):
                given = gr.UploadButton("Show a picture of your own", type="binary")
                gr.HTML(
                    f"<small>{', '.join(FORMATS)}; at most {MAX_BYTES // 2**20} MB; deleted here within 20 minutes.</small>"
                )
                back = gr.Button("Put everything back")
        outputs = [state, talk, shop, item, other, tiles]
        quiet = {
            "outputs": outputs,
            "api_visibility": "private",
            "concurrency_id": "model",
            "concurrency_limit": 1,
        }
        by_number = attempt(lambda visit, where, number: ask(panel.example(where, number)))
        blocks.load(show, state, **quiet)
        domain.input(
            lambda name: gr.Dropdown(**choices(name)), domain, example, api_visibility="private"
        ).then(by_number, [state, domain, example], **quiet)
        example.input(by_number, [state, domain, example], **quiet)
        typed = attempt(lambda visit, where, words: ask(panel.request(where, words)))
        gr.on([send.click, text.submit], typed, [state, domain, text], **quiet)
        shop.click(look, state, **quiet)
        swap.click(
            attempt(lambda visit, name: again(visit, visit.case.swap(visit.item, name))),
            [state, other],
            **quiet,
        )
        tiles.input(attempt(hide), [state, tiles], **quiet)
        given.upload(
            attempt(
                lambda visit, file: again(visit, visit.case.show(visit.item, read_upload(file)))
            ),
            [state, given],
            **quiet,
        )
        back.click(attempt(lambda visit: again(visit, visit.case.reset())), state, **quiet)
    return blocks.queue(max_size=64)


def serve(
    profile: str, seed: int | None, folder: Path | None, host: str, port: int, block: bool = True
):
    """Make what is missing, load the models and serve the page until interrupted. UserError where gradio or data are missing,
    or the port is taken."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
    except ImportError:
        raise UserError(NEEDS) from None
    run, start = Experiment(profile, seed, folder).prepare(), time.monotonic()
    prepare(run)
    blocks = page(Panel(run))
    theme = gr.themes.Default(
        primary_hue="blue",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    ).set(button_primary_background_fill=style.BLUE, button_primary_text_color="white")
    try:
        _, url, _ = blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            theme=theme,
            css=CSS,
            footer_links=[],
            max_file_size=MAX_BYTES,
            ssr_mode=False,
            pwa=False,
            enable_monitoring=False,
            prevent_thread_lock=True,
        )
    except OSError:
        raise UserError(
            f"cannot serve on {host}, port {port}: taken, or not of this machine; give another --port"
        ) from None
    print(f"ready in {time.monotonic() - start:.1f} s: {url}  (Ctrl-C ends it)", flush=True)
    return blocks.block_thread() if block else blocks
