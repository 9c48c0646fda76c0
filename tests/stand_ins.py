"""Stand-ins for what a rehearsal cannot have: the hub's checkpoints, and the published data.

A checkpoint has the files, the key names and the tile sizes of the one on the hub, narrow layers
and random weights. Mistral's tokenizer is the true one, from the package mistral-common; Vicuna's
has its form (tokenizer.model alone) and Mistral's words. The data folder has the published layout
and its oddities: items that splits share, ISBN-like ids, items without an image, a dialogue longer
than 2,048 tokens, a truth that stands twice. Its dialogues are the published ones where they are
there, else written here; titles and pictures are always our own.
"""

from __future__ import annotations

import json
import random
import string
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import mistral_common
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

from lavic_utils.config import DOMAINS, PACKAGE
from lavic_utils.mini import words as w
from lavic_utils.mini.drawing import draw_product

SENTENCEPIECE = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
NARROW |= {"num_attention_heads": 4, "initializer_range": 0.1}
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
CLIP_IMAGES = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 336},
}


# ---------------------------------------------------------------- checkpoints
def put(folder: Path, name: str, content: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")


def trainable_names(model) -> list[str]:
    return sorted(name for name, p in model.named_parameters() if p.requires_grad)


def sentencepiece(folder: Path, extra: tuple[str, ...], fast: bool, **more: object) -> None:
    """tokenizer.model and what describes it, and, where `fast`, the tokenizer.json made from it;
    `extra`: tokens added after its 32,000."""
    from transformers import AutoTokenizer

    names = dict(enumerate((*SPECIAL.values(), *extra), 0))
    ids = {i if i < 3 else 31997 + i: name for i, name in names.items()}
    look = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {str(i): {"content": n, "special": True, **look} for i, n in ids.items()}
    about = {"add_bos_token": True, "add_eos_token": False, "legacy": True, "sp_model_kwargs": {}}
    about |= {"tokenizer_class": "LlamaTokenizer", "model_max_length": 10**30, **SPECIAL, **more}
    put(folder, "special_tokens_map.json", {**SPECIAL, **more})
    put(folder, "tokenizer_config.json", about | {"added_tokens_decoder": added})
    (folder / "tokenizer.model").write_bytes(SENTENCEPIECE.read_bytes())
    if extra:
        put(folder, "added_tokens.json", {name: i for i, name in ids.items() if i > 2})
    if fast:
        made = json.loads(AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str())
        space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        first = {"type": "Prepend", "prepend": "▁"}  # as files of that time write `legacy`
        made["normalizer"] = {"type": "Sequence", "normalizers": [first, space]}
        put(folder, "tokenizer.json", {**made, "pre_tokenizer": None})


def hub_name(name: str) -> str:
    """A weight of a LLaVA as the hub's checkpoints call it."""
    name = name.removeprefix("model.")
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    parts = {
        "language_model.": "language_model.model.",
        "vision_tower.": "vision_tower.vision_model.",
    }
    for ours, theirs in parts.items():
        if name.startswith(ours) and not name.startswith(theirs):
            return theirs + name.removeprefix(ours)
    return name


def weights(folder: Path, model, name: Callable[[str], str] = str, pickled: bool = False) -> None:
    """Half precision in two shards and an index, as the hub's 7B checkpoints are."""
    import torch
    from safetensors.torch import save_file

    tensors = {name(n): t.half().contiguous() for n, t in model.state_dict().items()}
    names, ending = list(tensors), "bin" if pickled else "safetensors"
    base, places = "pytorch_model" if pickled else "model", {}
    for shard, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{base}-0000{shard}-of-00002.{ending}"
        some = {n: tensors[n] for n in part}
        torch.save(some, folder / file) if pickled else save_file(
            some, folder / file, {"format": "pt"}
        )
        places |= dict.fromkeys(part, file)
    total = sum(t.nbytes for t in tensors.values())
    put(
        folder,
        f"{base}.{ending}.index.json",
        {"metadata": {"total_size": total}, "weight_map": places},
    )


def built(folder: Path, config: dict, seed: int):
    """The model that config.json describes, with random weights."""
    import torch
    import transformers

    put(folder, "config.json", config)
    put(folder, "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    torch.manual_seed(seed)
    kind = getattr(transformers, config["architectures"][0])
    return kind(kind.config_class.from_pretrained(folder))


def vision_config() -> dict:
    true = {"image_size": 336, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000}
    narrower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    return {"model_type": "clip_vision_model", **true, **NARROW, **narrower}


def llava_next(folder: Path) -> None:
    """llava-hf/llava-v1.6-mistral-7b-hf."""
    config = json.loads((PACKAGE / "llava_v1_6_mistral_7b.json").read_text(encoding="utf-8"))
    text = config["text_config"] | NARROW | {"num_key_value_heads": 2, "torch_dtype": "bfloat16"}
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]  # where the hub's file has it
    config |= {"text_config": text, "vision_config": vision_config(), "vocab_size": 32064}
    config |= {"torch_dtype": "float16", "ignore_index": -100}
    model = built(folder, config, 0)
    weights(folder, model, hub_name)
    about = {"pad_token": "<pad>", "padding_side": "left", "processor_class": "LlavaNextProcessor"}
    sentencepiece(folder, ("<image>", "<pad>"), True, **about)
    images = {"aspect_ratio_setting": "anyres", "image_processor_type": "LlavaNextImageProcessor"}
    images |= {"image_grid_pinpoints": config["image_grid_pinpoints"]}
    put(folder, "preprocessor_config.json", {**CLIP_IMAGES, **images})


def llava_15(folder: Path) -> None:
    """llava-hf/llava-1.5-7b-hf."""
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05}
    text |= {"vocab_size": 32064, "torch_dtype": "float16", **NARROW}
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    config |= {"image_token_index": 32000, "pad_token_id": 32001, "projector_hidden_act": "gelu"}
    config |= {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    config |= {"text_config": text, "vision_config": vision_config(), "torch_dtype": "float16"}
    weights(folder, built(folder, config, 1), hub_name)
    about = {"pad_token": "<pad>", "padding_side": "left", "processor_class": "LlavaProcessor"}
    sentencepiece(folder, ("<image>", "<pad>"), True, **about)
    put(
        folder,
        "preprocessor_config.json",
        {**CLIP_IMAGES, "image_processor_type": "CLIPImageProcessor"},
    )


def vicuna(folder: Path) -> None:
    """lmsys/vicuna-7b-v1.5: pickled weights, and no tokenizer.json."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000}
    config |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float16"}
    config |= {"max_position_embeddings": 4096, "rms_norm_eps": 1e-05, **NARROW}
    weights(folder, built(folder, config, 2), pickled=True)
    sentencepiece(folder, (), False, padding_side="right")


def roberta(folder: Path, kind: str = "RobertaModel") -> None:
    """A RoBERTa with byte-level BPE: vocab.json and merges.txt."""
    from safetensors.torch import save_file
    from tokenizers import ByteLevelBPETokenizer

    folder.mkdir(parents=True, exist_ok=True)
    marks, texts = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], list(w.ID_CHUNKS)
    tokens = ByteLevelBPETokenizer()
    tokens.train_from_iterator(texts, vocab_size=400, special_tokens=marks)
    tokens.save_model(str(folder))
    config = {"architectures": [kind], "model_type": "roberta", "max_position_embeddings": 514}
    config |= {"vocab_size": tokens.get_vocab_size(), "type_vocab_size": 1, "pad_token_id": 1}
    model = built(folder, config | NARROW | {"initializer_range": 0.5}, 3)
    tensors = {n: t.contiguous().clone() for n, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


HUB: dict[str, Callable[[Path], None]] = {
    "llava-hf/llava-v1.6-mistral-7b-hf": llava_next,
    "llava-hf/llava-1.5-7b-hf": llava_15,
    "lmsys/vicuna-7b-v1.5": vicuna,
    "FacebookAI/roberta-large": lambda folder: roberta(folder, "RobertaForMaskedLM"),
    "princeton-nlp/sup-simcse-roberta-large": roberta,
    "hyp1231/blair-roberta-base": roberta,
}


# ---------------------------------------------------------------- data
@cache
def _mistral() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(str(SENTENCEPIECE))


def tokens(text: str) -> int:
    """Mistral's tokens of a text."""
    return len(_mistral().encode(text, bos=False, eos=False))


COUNTS = {"train": 5, "valid": 4, "test": 4}  # dialogues a domain
PICTURED = 4  # items a domain with pictures; one more has a picture that cannot be decoded
SHAPES = ((500, 500), (500, 250), (300, 500))


def written(domain: str, rng: random.Random) -> list[dict]:
    """Dialogues of our own about 24 items of a domain, two of them with ISBN-like ids."""
    ids: list[str] = []
    while len(ids) < 22:
        asin = "B0" + "".join(rng.choices(string.ascii_uppercase + string.digits, k=8))
        if tokens(asin) == 8:  # as most do
            ids.append(asin)
    ids += ["".join(rng.choices(string.digits, k=10)) for _ in range(2)]
    rows = []
    for i in range(sum(COUNTS.values())):
        ten = rng.sample(ids, 10)
        wish = f"{rng.choice(w.ATTRIBUTES['colour'])} and {rng.choice(w.ATTRIBUTES['pattern'])}"
        said = [f"<submission>I want something {wish}, row {i}.</submission>"]
        said += ["<comment>Do you like this?</comment>", "<submission>No.</submission>"] * (i % 3)
        if i == 0:
            said.insert(1, f"<comment>{'and it would have to look good, too, ' * 230}</comment>")
        right = next(asin for asin in ten if asin[0] == "B")
        truths = [right] if i % 5 else rng.sample(ids[:22], 2)  # some of these are not listed
        row = {"context": "\n".join(said), "context_items": truths[:1] if i == 4 else []}
        row |= {"gt": "This one.", "gt_items": truths * 2 if i == 3 else truths}
        rows.append(
            row
            | {"candidates_st": rng.sample(ten, 10), "candidates_gpt_large": rng.sample(ids, 10)}
        )
    return rows


def published(given: Path, domain: str) -> list[dict]:
    """A few of the published dialogues, chosen so that they share items: first the odd ones."""
    rows = []
    for split in ("valid", "test"):
        text = (given / DOMAINS[domain] / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")
        rows += [json.loads(line) for line in text if line]
    # truths of eight tokens, as most are
    rows = [row for row in rows if all(tokens(asin) == 8 for asin in row["gt_items"])]
    words = {id(row): len(row["context"].split()) for row in rows}

    def first(kind: Callable[[dict], bool]) -> list[dict]:
        return [row for row in rows if kind(row) and words[id(row)] < 900][:1]

    chosen = [max((r for r in rows if words[id(r)] < 3000), key=lambda r: words[id(r)])]
    chosen += first(lambda r: len(r["gt_items"]) > len(set(r["gt_items"])))
    chosen += first(lambda r: any(a[:2] != "B0" for a in r["candidates_st"]))
    chosen += first(lambda r: r["context"].count("<comment>") > 1 and listed(r))
    known = {a for row in chosen for a in (*row["candidates_st"], *row["gt_items"])}
    plain = [r for r in rows if words[id(r)] < 250]
    good = [r for r in plain if listed(r)]
    while len(chosen) < sum(COUNTS.values()):  # every other one holds its truth
        among = [r for r in (good if len(chosen) % 2 else plain) if all(r is not c for c in chosen)]
        chosen.append(min(among, key=lambda r: len({*r["candidates_st"], *r["gt_items"]} - known)))
        known |= {*chosen[-1]["candidates_st"], *chosen[-1]["gt_items"]}
    return chosen


def listed(row: dict) -> bool:
    """Does the list hold a right answer?"""
    return bool(set(row["gt_items"]) & set(row["candidates_st"]))


def about(domain: str, rng: random.Random) -> tuple[str, str, dict]:
    """(title, description, looks) of an item."""
    facts = {name: rng.choice(known) for name, known in w.ATTRIBUTES.items()}
    facts["kind"] = rng.choice(list(w.KINDS[domain]))
    facts["brand"] = rng.choice(w.BRANDS[domain])
    facts["feature"] = rng.choice(w.FEATURES[domain])
    return w.title(facts), w.description(facts), facts


def data_folder(
    folder: Path, address: str = "https://example.org", given: Path | None = None
) -> None:
    """The published files and images in their layout, links to images below `address`; `given`: a
    folder with the published dialogues."""
    catalogue, valid = {}, []
    for name in ("train_images", "valid_images"):
        (folder / name).mkdir(parents=True)
    for domain in DOMAINS:
        rng = random.Random(domain)
        rows = published(given, domain) if given else written(domain, rng)
        long = max(rows, key=lambda row: len(row["context"]))
        found = [row for row in rows if listed(row) and row is not long]
        talk = next(row for row in found if row["context"].count("</") > 2)
        other = next(row for row in found if row is not talk)
        plain = [row for row in rows if all(row is not one for one in (long, talk, other))]
        rng.shuffle(plain)
        first = COUNTS["train"] - 1
        rows = [long, *plain[:first], other, *plain[first:], talk]  # train, valid, test
        lists = Counter(a for row in rows for a in row["candidates_st"])
        right = next(a for a in talk["candidates_st"] if a in talk["gt_items"])
        known = dict.fromkeys([right, *(a for a, _ in lists.most_common())])
        pictured = [a for a in known if a not in catalogue][: PICTURED + 1]
        for row in rows:
            for asin in (*row["candidates_st"], *row["candidates_gpt_large"], *row["gt_items"]):
                if asin in catalogue:
                    continue
                title, said, looks = about(domain, rng)
                item = {
                    "title": title,
                    "categories": [DOMAINS[domain]],
                    "features": [],
                    "description": [],
                }
                many = 2 if asin in pictured[1:3] else 1
                files = [f"train_images/{asin}_{k}.jpg" for k in range(many)]
                linked = asin in pictured or len(catalogue) % 5 == 0  # others have no link at all
                item["images"] = [{"large": f"{address}/{file}"} for file in files if linked]
                texts = {}
                for k, file in enumerate(files if asin in pictured else ()):
                    shape = SHAPES[(pictured.index(asin) + k) % 3]
                    draw_product(looks, shape, rng).save(folder / file, "JPEG")
                    texts[Path(file).name] = said if k == 0 else f"{said}, seen from another side"
                catalogue[asin] = item | {"image_descriptions_llava_cleaned": texts}
        broken = folder / f"train_images/{pictured[-1]}_0.jpg"
        broken.write_bytes(broken.read_bytes()[:900])
        for i in range(2):
            title, said, looks = about(domain, rng)
            name = f"B0V{domain[:2].upper()}0000{i}_0.jpg"
            draw_product(looks, SHAPES[i], rng).save(folder / "valid_images" / name, "JPEG")
            line = {"title": title, "image_name": name, "image": f"{address}/valid_images/{name}"}
            valid.append(line | {"image_description_llava_cleaned": said})
        for split, count in COUNTS.items():
            lines(folder / DOMAINS[domain] / f"{split}.jsonl", rows[:count])
            rows = rows[count:]
    put(folder, "item2meta_train.json", catalogue)
    lines(folder / "item2meta_valid.jsonl", valid)
    with zipfile.ZipFile(folder / "item2meta_train.json.zip", "w") as archive:
        archive.write(folder / "item2meta_train.json", "item2meta_train.json")


def lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
