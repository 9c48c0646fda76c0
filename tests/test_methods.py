"""The registry: 19 methods that run, on tiny random models of the real architectures where the real
ones are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import stand_ins
import torch
from server import Handler, serving
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    RobertaConfig,
    RobertaModel,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from lavic_utils import experiment, hub, methods, prompts, recommendation, report, vision
from lavic_utils.__main__ import main
from lavic_utils.audit import answer_files as answers
from lavic_utils.bench import plan
from lavic_utils.config import UserError, World, load_profile
from lavic_utils.data import image_file, open_image
from lavic_utils.evaluation import parse_answer
from lavic_utils.mini import model as minimodel
from lavic_utils.mini.world import make_world
from lavic_utils.remote import chat_api as endpoint

TINY = World(
    image_side=48,
    train_shards=1,
    shard_items=64,
    stage1_valid_items=12,
    train_dialogues=20,
    valid_dialogues=5,
    test_dialogues=12,
    p_extra_image=0.0,
    missing_images=2,
    corrupt_images=2,
)
OPEN = ["Vicuna-v1.5", "LLaVA-v1.5 (title)", "LLaVA-v1.5 (title+image)"]


def save_roberta(folder: Path) -> Path:
    folder.mkdir()
    torch.manual_seed(0)
    tokens = ByteLevelBPETokenizer()
    tokens.train_from_iterator(
        ["a modern lamp"],
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    )
    tokens.save_model(str(folder))
    RobertaModel(
        RobertaConfig(
            vocab_size=tokens.get_vocab_size(),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=514,
        )
    ).save_pretrained(folder)
    return folder


def save_llama(folder: Path) -> Path:
    torch.manual_seed(1)
    tokenizer = minimodel.build_tokenizer()
    LlamaForCausalLM(_llama(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _llama(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def save_llava(folder: Path) -> Path:
    """A LLaVA 1.5: CLIP of 24 x 24 pixels and patches of 12, so 4 tokens an image."""
    torch.manual_seed(2)
    tokenizer = minimodel.build_tokenizer()
    vision_config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=24,
        patch_size=12,
        projection_dim=16,
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=_llama(len(tokenizer)),
        vision_feature_layer=-2,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world") / "tiny", TINY)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Method -> a tiny checkpoint of its model's architecture."""
    root = tmp_path_factory.mktemp("models")
    roberta, llama, llava = (
        save_roberta(root / "roberta"),
        save_llama(root / "llama"),
        save_llava(root / "llava"),
    )
    return {
        **{name: str(roberta) for name in ("RoBERTa-Large", "SimCSE-Large", "BLaIR-Base")},
        "Vicuna-v1.5": str(llama),
        "LLaVA-v1.5 (title)": str(llava),
        "LLaVA-v1.5 (title+image)": str(llava),
    }


@pytest.fixture
def run(monkeypatch, tmp_path, world, folders) -> experiment.Experiment:
    monkeypatch.setenv("LAVIC_RESULTS", str(tmp_path / "results"))
    monkeypatch.delenv(endpoint.KEY, raising=False)
    profile = load_profile("mini")
    long = profile.recommendation.model_copy(
        update={"max_length": 1200}
    )  # the mini tokenizer spells other models' prompts
    return experiment.Experiment(
        profile.model_copy(update={"models": folders, "recommendation": long}), 42, world
    )


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


# ---------------------------------------------------------------- room
def test_every_stage_counts_what_is_free_before_it_loads_a_model(run, monkeypatch):
    asked = []

    def nothing_free(profile, stage, tokens=None):
        asked.append((stage, tokens() if tokens else None))
        raise UserError("no room")

    def loaded(*about):
        raise AssertionError("a model was loaded before room was asked for")

    monkeypatch.setattr(plan, "refuse_now", nothing_free)
    monkeypatch.setattr(experiment.Experiment, "model", loaded)
    monkeypatch.setattr(methods, "load_open", loaded)
    stages = [(run.teach, "teacher")]
    for name in ("LLaVA-v1.6 (title)", "Vicuna-v1.5"):
        stages.append((partial(run.answers, name, "home"), "inference"))
    for ask, stage in stages:
        with pytest.raises(UserError, match="no room"):
            ask()
        assert asked.pop()[0] == stage and not asked
    monkeypatch.setattr(
        experiment.Experiment,
        "teach",
        lambda self: {s: [""] * len(self.pictures(s)) for s in ("train", "valid")},
    )
    for ask, stage in (
        (run.distil, "distillation"),
        (partial(run.tune, "LaViC w/o images", "home"), "recommendation"),
    ):
        with pytest.raises(UserError, match="no room"):
            ask()
        assert asked.pop()[0] == stage and not asked


# ---------------------------------------------------------------- the registry
def test_the_registry_is_the_published_tables():
    rows = {row["method"]: row for row in report.published()["rows"]}
    assert list(methods.METHODS) == list(rows) and len(rows) == 19
    for name, method in methods.METHODS.items():
        assert (method.name, method.family, method.inputs) == (
            name,
            rows[name]["family"],
            rows[name]["inputs"],
        )


def test_methods_lists_what_can_run_and_why_the_rest_cannot(capsys, monkeypatch):
    monkeypatch.delenv(endpoint.KEY, raising=False)
    listed = methods.listing(experiment.Experiment("mini"))
    rows = {row["name"]: row for row in listed}
    assert len(rows) == 19 and all(
        set(r) == {"name", "family", "inputs", "runnable", "reason"} for r in rows.values()
    )
    can = {name for name, row in rows.items() if row["runnable"]}
    assert can == {
        "BM25",
        "SBERT",
        "LLaVA-v1.6 (title)",
        "LLaVA-v1.6 (title+image)",
        "Entire tokens (5x577)",
        "LaViC w/o images",
        "LaViC w/o self-distillation",
        "LaViC",
    }
    assert all((row["reason"] is None) == row["runnable"] for row in rows.values())
    said = methods.METHODS["Vicuna-v1.5"].hub
    assert said.command.startswith("hf download lmsys/vicuna-7b-v1.5 --revision 3321f76e")
    assert "the mini world asks no model of the hub" in rows["Vicuna-v1.5"]["reason"]
    assert (
        "13.5 GB" in rows["Vicuna-v1.5"]["reason"]
        and endpoint.KEY in rows["GPT-4o (title)"]["reason"]
    )
    assert rows["GPT-4o (title)"]["reason"].startswith("costs money: run ")
    monkeypatch.setenv(
        endpoint.KEY, "sk-only-a-test"
    )  # a key alone spends nothing, and is not said
    assert methods.listing(experiment.Experiment("mini")) == listed
    assert main(["methods"]) == 0
    said = capsys.readouterr().out
    assert "hf download lmsys/vicuna-7b-v1.5" in said and said.count("costs money") == 1


def test_a_method_that_cannot_run_is_one_line_and_exit_2(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("LAVIC_RESULTS", str(tmp_path))
    for name, domain, said in (
        ("Vicuna-v1.5", "home", "the mini world asks no model of the hub"),
        ("GPT-4o (title)", "home", endpoint.KEY),
        ("Vicuna-v9", "home", "no method 'Vicuna-v9'"),
        ("bm25", "shoes", "shoes/test"),
    ):
        assert main(["run", name, "--domain", domain]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error
    assert not list(tmp_path.rglob("*.jsonl"))


LOADING = """from lavic_utils import methods
from lavic_utils.config import UserError, load_profile
try:
    source = methods.METHODS["Vicuna-v1.5"].hub.source()
    methods.load_open(load_profile("mini"), *source)
    print("loaded")
except (UserError, OSError) as error:
    print(error)
"""


def test_a_download_that_broke_off_is_not_completed_unasked(tmp_path):
    class Hub(Handler):
        def do_GET(self):
            self.behave(self.path, "absent")

        do_HEAD = do_GET

        def absent(self, first):
            self.send(b"", 404)

    place = tmp_path / "hub" / "models--lmsys--vicuna-7b-v1.5" / "snapshots"
    place = place / methods.VICUNA_7B.revision
    stand_ins.vicuna(place)
    (shard, *_) = sorted(place.glob("pytorch_model-*.bin"))
    with serving(Hub) as hub:
        given = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.address}
        given |= {"HF_HUB_OFFLINE": "0"}

        def loaded(**more: str) -> str:
            command = [sys.executable, "-c", LOADING]
            done = subprocess.run(
                command, env=given | more, capture_output=True, text=True, timeout=200
            )
            assert not done.returncode and not hub.log, (done.stderr[-2000:], hub.log)
            return done.stdout

        assert loaded(ALL_PROXY="socks://127.0.0.1:9") == "loaded\n"  # negative control
        shard.rename(shard.with_suffix(".incomplete"))
        assert "or not whole" in loaded() and "hf download lmsys/vicuna-7b-v1.5" in loaded()
        shard.with_suffix(".incomplete").rename(shard)
        (place / "tokenizer.model").unlink()
        assert "or not whole" in loaded()


def test_a_model_that_is_there_in_part_is_no_stand_in(tmp_path, monkeypatch):
    model = hub.HubModel("me/model", None, 15.0)
    for name in ("config.json", "tokenizer.json", "model-00002-of-00002.safetensors"):
        (tmp_path / name).write_text("{}")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not model.stand_in(str(tmp_path))
    (tmp_path / "model-00001-of-00002.safetensors").write_text("{}")
    assert model.stand_in(str(tmp_path))  # negative control


def test_a_new_method_is_one_class_and_one_entry(run, monkeypatch, capsys):
    """What the documentation shows: the last candidate of each list, as a method."""

    @dataclass(frozen=True)
    class Last(methods.Method):
        def answer(self, run, domain, split, dialogues, control=None):
            lists = [getattr(d, run.profile.candidates) for d in dialogues]
            return [recommendation.Answer(f"{names[-1]}", names[-1], names) for names in lists]

    monkeypatch.setitem(methods.METHODS, "Last candidate", Last("Last candidate"))
    said = answers.run_method(run, "last candidate", "home")
    path = Path(said.split("\n")[1])
    assert main(["evaluate", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    truth = [d.candidates_st[-1] in d.gt_items for d in run.dialogues("home", "test")]
    assert (found["rows"], found["valid"], found["hit_ratio_conversations"]) == (
        12,
        12,
        sum(truth) / 12,
    )
    assert report.record(run, ["Last candidate"], ["home"]).iloc[0]["hits"] == sum(truth)


# ---------------------------------------------------------------- every open row runs
@pytest.mark.parametrize(
    "name",
    [
        "BM25",
        "SBERT",
        "RoBERTa-Large",
        "SimCSE-Large",
        "BLaIR-Base",
        *OPEN,
        "LLaVA-v1.6 (title)",
        "LLaVA-v1.6 (title+image)",
    ],
)
def test_open_rows_run_and_evaluate_reads_them(run, name):
    path = Path(answers.run_method(run, name, "beauty", limit=6).split("\n")[1])
    rows, method = answers.read_answers(path), methods.find(name)
    assert len(rows) == 6
    key = "st" if method.chooses else methods.slug(name)
    lines = read(path)
    fields = {f"recommended_{key}", f"response_{key}", f"candidates_{key}", "context", "gt_items"}
    assert all(fields <= set(line) for line in lines)
    original = [d.candidates_st for d in run.dialogues("beauty", "test")[:6]]
    if method.chooses:
        assert [tuple(line["candidates_st"]) for line in lines] == original
    else:
        assert (
            all(r.recommended == r.candidates[0] for r in rows)
            and [r.candidates for r in rows] != original
        )


def test_a_profile_that_names_a_folder_without_a_model_says_so(run, tmp_path):
    run.profile = run.profile.model_copy(update={"models": {"Vicuna-v1.5": str(tmp_path)}})
    with pytest.raises(UserError, match=r"no config.json in it.*`models`"):
        answers.run_method(run, "Vicuna-v1.5", "beauty")


# ---------------------------------------------------------------- prompts: golden
GOLDEN = {
    "Vicuna-v1.5": "A chat between a curious user and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the user's questions. USER: MESSAGE "
    "ASSISTANT:",
    "LLaVA-v1.5 (title)": "USER: MESSAGE ASSISTANT:",
    "LLaVA-v1.5 (title+image)": "USER: MESSAGE ASSISTANT:",
}
TURNS = [("seeker", "I need a lamp {red}."), ("helper", "How tall?")]
NAMES, TITLES = ("B000000001", "B000000002"), {"B000000001": "Oak lamp", "B000000002": "Tin mug"}


def test_golden_prompts():
    paper = load_profile("paper").prompts
    for name, chat in GOLDEN.items():
        assert methods.METHODS[name].chat.replace("{message}", "MESSAGE") == chat
    assert paper.chat == load_profile("t4").prompts.chat == "[INST] {message} [/INST]"
    asked = paper.chat.format(
        message=prompts.recommend_message(
            paper,
            TURNS,
            [prompts.Candidate(a, TITLES[a], int(a == NAMES[0])) for a in NAMES],
            "<image>",
        )
    )
    assert asked == (
        "[INST] You recommend one of the listed items to the seeker, judging by what they ask for "
        "and by how the items look.\n\n"
        "Dialogue:\nSeeker: I need a lamp {red}.\nHelper: How tall?\n\nCandidates:\n"
        "ID: B000000001\nTitle: Oak lamp\nImage: <image>\nID: B000000002\nTitle: Tin mug\n\n"
        "Answer with the ID of the best item only. [/INST]"
    )


def test_long_dialogues_lose_their_oldest_comments_first():
    turns = [
        ("seeker", "first " * 40),
        ("helper", "old comment"),
        ("helper", "new comment"),
        ("seeker", "last wish"),
    ]
    assert prompts.shortened(turns, 0) == turns
    assert [t for _, t in prompts.shortened(turns, 1)] == [turns[0][1], "new comment", "last wish"]
    assert [t for _, t in prompts.shortened(turns, 2)] == [turns[0][1], "last wish"]
    assert (
        prompts.shortened(turns, 12)[0][1].split() == ["first"] * 30
    )  # then the seeker's oldest words
    tokenizer, profile = minimodel.build_tokenizer(), load_profile("mini")
    items = [prompts.Candidate(a, TITLES[a]) for a in NAMES]
    fits = [
        prompts.recommend_prompt(tokenizer, profile.prompts, turns, items, room)
        for room in (80, 60)
    ]
    assert all(len(p.ids) <= room for p, room in zip(fits, (80, 60), strict=True))
    assert 0 < fits[0].dropped_dialogue_tokens < fits[1].dropped_dialogue_tokens
    whole = prompts.recommend_prompt(tokenizer, profile.prompts, turns, items, 500)
    assert (
        whole.dropped_dialogue_tokens == 0 and len(fits[0].ids) > 80 - 8
    )  # no more is cut than must be


# ---------------------------------------------------------------- equality with transformers' own
# forward
@torch.inference_mode()
def test_a_language_models_scores_are_its_own_forward(run, folders):
    profile = run.profile.model_copy(
        update={"prompts": run.profile.prompts.model_copy(update={"chat": methods.VICUNA})}
    )
    model, tokenizer = methods.load_open(profile, folders["Vicuna-v1.5"], None)
    prompter = recommendation.Prompter(tokenizer, profile, run.titles, None)
    row = run.dialogues("home", "test")[0]
    got = recommendation.generate_answers(model, prompter, [row], "candidates_st")[0]
    prompt = prompter.prompt(row, row.candidates_st).ids
    for name, value in list(zip(row.candidates_st, got.log_likelihoods, strict=True))[:3]:
        target = prompter.target_ids(name)
        scores = model(torch.tensor([prompt + target])).logits.log_softmax(-1)[
            0, len(prompt) - 1 : -1
        ]
        assert value == pytest.approx(
            float(scores.gather(1, torch.tensor(target)[:, None]).mean()), abs=1e-4
        )


@torch.inference_mode()
@pytest.mark.parametrize("name", ["LLaVA-v1.5 (title+image)", "LLaVA-v1.6 (title+image)"])
def test_placed_full_tokens_are_the_models_own_forward(run, folders, name):
    """Prompt and pictures through our placing equal pixel values through transformers' own forward,
    logit by logit."""
    row, which = run.dialogues("fashion", "test")[1], run.profile.candidates
    new = "1.6" in name
    model, processor = (
        (run.model(), run.processor) if new else methods.load_open(run.profile, folders[name], None)
    )
    files = {a: image_file(run.root, a) for a in getattr(row, which)}
    visual = vision.lazy_full_tokens(lambda: model, processor, run.readable(files))
    assert all(vision.lengths(visual)[a] == len(visual[a]) for a in visual)
    prompter = recommendation.Prompter(processor.tokenizer, run.profile, run.titles, visual)
    prompt = prompter.prompt(row, row.candidates_st)
    assert len(prompt.visual) > 5 and not prompt.dropped_images
    ids = torch.tensor([prompt.ids])
    placed = model(inputs_embeds=vision.place(model, ids, prompter.tokens([prompt]), 0)).logits
    images = [open_image(image_file(run.root, a)) for a in prompt.visual]
    pixels = processor.image_processor(images, return_tensors="pt")
    assert torch.allclose(placed, model(input_ids=ids, **pixels).logits, atol=1e-4)
    backwards = processor.image_processor(
        images[::-1], return_tensors="pt"
    )  # negative control: pictures in other slots
    if not new:
        assert not torch.allclose(placed, model(input_ids=ids, **backwards).logits, atol=1e-3)


def allowed(targets: list[list[int]], start: int, _: int, ids: torch.Tensor) -> list[int]:
    """The tokens with which one of the targets can go on: a prefix tree, walked."""
    said = ids[start:].tolist()
    return sorted(
        {t[len(said)] for t in targets if t[: len(said)] == said and len(t) > len(said)}
    ) or [2]


@torch.inference_mode()
def test_constrained_choice_is_transformers_prefix_constrained_generation(run, folders):
    model, tokenizer = methods.load_open(run.profile, folders["Vicuna-v1.5"], None)
    prompter = recommendation.Prompter(tokenizer, run.profile, run.titles, None)
    differs = 0
    for row in run.dialogues("home", "test")[:6]:
        got = recommendation.generate_answers(model, prompter, [row], "candidates_st")[0]
        prompt, targets = (
            prompter.prompt(row, row.candidates_st).ids,
            [prompter.target_ids(a) for a in row.candidates_st],
        )
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=10,
            do_sample=False,
            prefix_allowed_tokens_fn=partial(allowed, targets, len(prompt)),
        )
        written = parse_answer(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True))
        assert written == got.constrained in row.candidates_st
        differs += got.response != got.constrained
    assert (
        differs
    )  # free generation of a random model is no id at all: the constraint did something


# ---------------------------------------------------------------- what does not fit, and in which
# order
def test_what_overflows_the_context_is_refused_and_counted(run):
    found = run.answered("LLaVA-v1.6 (title+image)", "home")["rows"]
    refused = [row for row in found if row["refused"]]
    room = 512 - run.profile.recommendation.max_new_tokens
    assert refused and all(
        row["refused"] > room and row["response"] == "" and row["recommended"] is None
        for row in refused
    )
    score = run.score("LLaVA-v1.6 (title+image)", "home")
    assert score.conversations == 12 and score.valid == sum(
        r["recommended"] in r["candidates"] for r in found
    )
    row = report.record(run, ["LLaVA-v1.6 (title+image)"], ["home"]).iloc[0]
    assert row["refused"] == len(refused)
    assert (
        "refused)"
        in report.comparison(report.read_metrics(report.metrics_path(run)), "open_source").loc[
            "LLaVA-v1.6 (title+image)", ("home", "mini run")
        ]
    )


def test_the_order_of_candidates_is_seeded_recorded_and_changes_nothing_else(run):
    plain, again = run.dialogues("home", "test"), run.dialogues("home", "test", 1)
    assert again == run.dialogues("home", "test", 1) != run.dialogues("home", "test", 2)
    assert [d.candidates_st for d in plain] != [d.candidates_st for d in again]
    for a, b in zip(plain, again, strict=True):
        assert sorted(a.candidates_st) == sorted(b.candidates_st) and a.context == b.context
    path = Path(answers.run_method(run, "LLaVA-v1.6 (title)", "home", order=1).split("\n")[1])
    assert [tuple(line["candidates_st"]) for line in read(path)] == [d.candidates_st for d in again]
    assert read(path)[0]["gt_items"] == list(plain[0].gt_items)


def test_table_prints_published_beside_ours_with_tier_and_reason(run, capsys, monkeypatch):
    report.record(run, ["BM25"])
    rows = {(r["method"], r["domain"]): r for r in report.table_rows(run, "open_source")}
    assert len(rows) == 11 * 3
    assert (
        rows["BM25", "home"]["ours"].count("[") == 1
        and rows["BM25", "home"]["tier of ours"] == "mini run"
    )
    assert rows["BM25", "home"]["published"] == "0.0479" and rows["BM25", "home"]["note"] == ""
    assert (
        rows["LaViC", "home"]["ours"] == ""
        and "lavic_utils run 'LaViC' --domain DOMAIN" in rows["LaViC", "home"]["note"]
    )
    with pytest.raises(UserError, match="no table 'nine'"):
        report.table_rows(run, "nine")
    assert main(["table", "ablation"]) == 0 and "0.1187 / 0.970" in capsys.readouterr().out


# ---------------------------------------------------------------- proprietary rows, over real HTTP
class Service(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        body = json.dumps(
            {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": asked["model"],
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": self.server.say(asked)},
                    }
                ],
                "usage": {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105},
            }
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *about: object) -> None:
        pass


@pytest.fixture
def service():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def afresh(run: experiment.Experiment) -> experiment.Experiment:
    """The same run, as another command makes it."""
    return experiment.Experiment(run.profile, run.seed, run.root, run.api)


@pytest.mark.parametrize(
    "name", [name for name, m in methods.METHODS.items() if m.family == "proprietary"]
)
def test_proprietary_rows_ask_a_service_once(run, service, name):
    row = run.dialogues("home", "test")[0]
    service.say = lambda asked: f"I would take {row.candidates_st[2]}."
    run.api = endpoint.Settings(
        max_usd=1.0, base_url=f"http://127.0.0.1:{service.server_port}/v1", served="tiny"
    )
    path = Path(answers.run_method(run, name, "home", limit=3).split("\n")[1])
    assert [line["recommended_st"] for line in read(path)] == [row.candidates_st[2]] * 3
    asked = service.asked[0]["messages"][0]["content"]
    text = asked if isinstance(asked, str) else asked[0]["text"]
    assert (
        row.candidates_st[0] in text
        and run.titles[row.candidates_st[0]] in text
        and "<image>" not in text
    )
    assert isinstance(asked, str) == ("image" not in name) and {
        a["model"] for a in service.asked
    } == {"tiny"}
    before = len(service.asked)
    answers.run_method(afresh(run), name, "home", limit=3)
    assert len(service.asked) == before == 3
    answers.run_method(
        run, name, "home", limit=3, order=1
    )  # negative control: another order is another question
    assert len(service.asked) > before


def test_another_model_stands_beside_the_papers_row_and_no_failure_is_kept(run, service):
    name, second = "GPT-4o (title)", run.dialogues("home", "test")[1].candidates_st

    def say(asked: dict) -> str:
        lost = all(asin in asked["messages"][0]["content"] for asin in second)
        return "" if lost else "none of them"

    with pytest.raises(UserError, match="costs money"):  # as in a notebook
        run.answers(name, "home")
    url, service.say = f"http://127.0.0.1:{service.server_port}/v1", say
    run.api = endpoint.Settings(base_url=url, served="tiny")
    said = answers.run_method(run, name, "home").split("\n")[0]
    label, by = f"tiny at 127.0.0.1:{service.server_port} (title)", said.split(" (")[0]
    assert said.startswith(f"{label}, home/test: 11 answers in ") and "$" not in said
    assert said.endswith(", 1 not answered (no text (stop))")
    report.record(run, [name], ["home"])
    assert len(service.asked) == 12  # scoring asks nothing again
    metrics = report.read_metrics(report.metrics_path(run))
    found = {"method": label, "answered_by": by, "beside": name}
    assert metrics["rows"][0].items() >= found.items()
    assert metrics["rows"][0]["unanswered"] == {"no text (stop)": 1}
    table = report.comparison(metrics, "proprietary")
    assert list(table.index).index(label) == list(table.index).index(name) + 1
    assert table.loc[name, ("home", "mini run")] == report.NOT_RUN
    assert table.loc[label, ("home", "mini run")].endswith(" (1 unanswered)")
    assert table.loc[label, ("home", "published")] == ""
    rows = {row["method"]: row for row in report.table_rows(run, "proprietary")}
    assert rows[label]["note"] == "" != rows[name]["note"]
    service.say = lambda asked: "none of them"
    assert "12 answers" in answers.run_method(afresh(run), name, "home")
    assert len(service.asked) == 13  # only what had no answer
    answers.run_method(afresh(run), name, "home")
    assert len(service.asked) == 13


def test_a_dry_run_says_what_a_run_takes(run, service):
    url = f"http://127.0.0.1:{service.server_port}/v1"
    run.api = endpoint.Settings(base_url=url, served="tiny")
    said = plan.foreseen(run, "GPT-4o (title+image)", "home", "test", 3)
    assert f"\nto ask: 3 requests to tiny at {url}, at no cost, as the service is your own" in said
    assert said.endswith("; 0 more are answered already")
    assert service.asked == []
    said = plan.foreseen(run, "LaViC", "home", "test", None)
    assert "12 dialogues; all that it reads is here\nto train: " in said
    assert said.count("stage1") == said.count("stage2") == 1
    said = plan.foreseen(run, "LaViC w/o images", "home", "test", None)
    assert "stage1" not in said and "stage2" in said  # negative control
    said = plan.foreseen(run, "bm25", "home", "test", None)
    assert "to train" not in said and "to ask" not in said
