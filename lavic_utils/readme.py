"""The README's generated blocks: written from the files under results/ alone, and checked against them."""

from __future__ import annotations

import json
import subprocess

from lavic_utils.bench import speed_block
from lavic_utils.claims import claims_summary
from lavic_utils.config import ROOT, UserError
from lavic_utils.provenance import footer, write_text
from lavic_utils.report import NOT_RUN, comparison


def readme_block() -> str:
    """The results tables of the README, from the committed metrics file alone."""
    metrics = json.loads((ROOT / "results" / "mini" / "metrics.json").read_text(encoding="utf-8"))
    lines = [f"*{footer(metrics['provenance'])}. HR@1 over conversations, mean over seeds [95 % interval over dialogues] / VR; "
             "published figures: the paper's. The two columns measure different worlds and are not comparable.*", ""]
    for table in ("open_source", "ablation"):
        frame = comparison(metrics, table)
        tier = metrics["provenance"]["tier"]
        ran = frame[frame[("beauty", tier)] != NOT_RUN]
        heads = [f"{d}, {kind}" for d, kind in frame.columns]
        lines += [f"**Table: {table.replace('_', ' ')}**", "", "| method | " + " | ".join(heads) + " |",
                  "| --- |" + " --- |" * len(heads)]
        lines += [f"| {name} | " + " | ".join(row) + " |" for name, row in zip(ran.index, ran.values, strict=True)]
        lines.append("")
    return "\n".join(lines)


def speed() -> str:
    """What `make bench` measured, for each machine whose file is committed; then what `bench gpu` did, for each card's."""
    found = sorted((ROOT / "results" / "bench").glob("*.json"))
    cards = [path for path in found if path.stem.endswith("-gpu")]
    blocks = [speed_block(path) for path in found if not path.stem.endswith(("-gpu", "-rehearsal"))] or ["not measured yet\n"]
    if cards:
        from lavic_utils.bench_gpu import gpu_block

        blocks += map(gpu_block, cards)
    return "\n".join(blocks)


def own_results() -> bool:
    """Whether the results here are of a run of somebody's own, later than what is committed: README.md then is as committed and
    results/mini/metrics.json is not. Without git, or outside a checkout: no."""
    changed = subprocess.run(["git", "status", "--porcelain", "README.md", "results/mini/metrics.json"], cwd=ROOT,
                             capture_output=True, text=True, check=False).stdout
    return "metrics.json" in changed and "README.md" not in changed


def update_readme(check: bool = False) -> list[str]:
    """Rewrite (or, with `check`, only compare) the README's generated blocks. Returns what is stale. After a run of one's own
    there is nothing to compare: the README shows the committed results."""
    if check and own_results():
        print("README.md shows the committed results, results/mini/metrics.json those of a run of your own: not compared")
        return []
    path = ROOT / "README.md"
    text = fresh = path.read_text(encoding="utf-8")
    for name, block in (("results", readme_block), ("claims", claims_summary), ("speed", speed)):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin not in fresh or end not in fresh:
            raise UserError(f"{path.name}: markers {begin} and {end} not found; put them where the tables belong")
        head, rest = fresh.split(begin, 1)
        fresh = head + begin + "\n" + block() + end + rest.split(end, 1)[1]
    if fresh == text:
        return []
    if not check:
        write_text(path, fresh)
        return []
    return [f"{path.name}: its generated blocks differ from the files under results/; run `python -m lavic_utils readme`"]


