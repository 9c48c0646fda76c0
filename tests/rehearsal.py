"""`make rehearsal`: what docs/researcher.md tells a researcher with a GPU to do, done here.

The commands are taken from that page. The profiles are `paper` and `t4` as they are (but for t4's 4
bits, which need a card); hub, published files, product images and chat service come from a local
server that serves the stand-ins of `stand_ins.py`. Twice, at a moment drawn at random, a process is
killed, and the same command must go on. What it makes has the tier "rehearsal", in a folder apart.
Where there is no card, models are on a pretended one (tests/pretend): a tensor left behind fails.

    python tests/rehearsal.py [FOLDER]      # kept where a folder is given, or something fails
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "researcher.md"
PRETEND = ROOT / "tests" / "pretend"
LAVIC, SEED = "python -m lavic_utils ", 42
# Commands of the page that stand for themselves elsewhere, by how they begin: why they are left out
LEFT_OUT = {
    "make install": "this environment",
    "python -m pip install": "bitsandbytes needs a card",
    "export LAVIC_DATA": "set to the temporary folder",
    "accelerate launch": "tests/test_processes.py",
    "hf upload": "needs an account",
    f"{LAVIC}reproduce": "the mini run: make test",
}


# ---------------------------------------------------------------- the page
def page_commands(text: str) -> list[str]:
    """Every command of the page, blocks and code spans alike, in order."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ")
    found = [line.split(" #")[0].strip() for line in blocks.split("\n")]
    spans = re.findall(
        r"`(python -m lavic_utils [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S)
    )
    return [re.sub(r"\s+", " ", one) for one in [*found, *spans] if one]


def left_out(command: str) -> str | None:
    """Why a command of the page is not run here; None where it is."""
    for begins, why in LEFT_OUT.items():
        if command == begins or (command.startswith(begins) and not begins.startswith(LAVIC)):
            return why
    return None


# ---------------------------------------------------------------- the local server
def handler(hub: Path, data: Path, revisions: dict[str, str]):
    """A class of `server.Handler`: the hub's interface, the published files below data/, images,
    and a chat service that names the first candidate."""
    import server

    class Everything(server.Handler):
        def file(self, path: Path, **headers: str) -> None:
            body = path.read_bytes() if path.is_file() else b""
            self.send(
                body if self.command == "GET" else b"", 200 if body else 404, len(body), **headers
            )
            self.close_connection = False

        def do_GET(self) -> None:
            place = self.path.split("?")[0].strip("/")
            if tree := re.fullmatch(r"api/models/(.+/.+)/tree/\w+", place):
                files = sorted((hub / tree[1]).iterdir())
                rows = [{"path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files]
                rows = [{"type": "file", **row} for row in rows]
                self.send(json.dumps(rows).encode(), Content_Type="application/json")
            elif found := re.fullmatch(r"([^/]+/[^/]+)/resolve/(\w+)/([^/]+)", place):
                about = {"ETag": f'"{found[3]}"', "X_Repo_Commit": revisions[found[1]]}
                self.file(hub / found[1] / found[3], **about)
            else:
                self.file(data / place.removeprefix("data/"))

        do_HEAD = do_GET

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = json.dumps(asked["messages"])
            named = re.search(r"ID: (\w+)", text)[1]
            choice = {"index": 0, "finish_reason": "stop"}
            choice["message"] = {"role": "assistant", "content": named}
            usage = {"prompt_tokens": len(text) // 4, "completion_tokens": 8}
            usage["total_tokens"] = sum(usage.values())
            said = {"id": "x", "object": "chat.completion", "created": 1, "model": "stand-in"}
            said |= {"choices": [choice], "usage": usage}
            self.send(json.dumps(said).encode(), Content_Type="application/json")

    return Everything


# ---------------------------------------------------------------- running commands
class Failed(Exception):
    pass


def lavic(command: str, code: int = 0) -> str:
    """A command of the package, in this process; what it printed."""
    from lavic_utils.__main__ import main

    start = time.monotonic()
    said, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        got = main(shlex.split(command.removeprefix(LAVIC)))
    print(f"{time.monotonic() - start:6.1f} s  {command}", flush=True)
    out, err = (one.buffer.getvalue().decode() for one in (said, errors))
    if got != code:
        raise Failed(f"{command}: exit code {got}, not {code}\n{(out + err)[-3000:]}")
    return out


def shell(command: list[str], environment: dict[str, str]) -> str:
    """A command in a process of its own; what it printed."""
    start = time.monotonic()
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    print(f"{time.monotonic() - start:6.1f} s  {shlex.join(command[-6:])}", flush=True)
    if done.returncode:
        raise Failed(
            f"{shlex.join(command)}: {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
    return done.stdout


def killed_once(command: str, begun: Path, most: float, rng: random.Random) -> tuple[str, float]:
    """The command in a process group of its own, killed at random up to `most` seconds after the
    file `begun` is there; then the same command, which must go on to its end: what it printed, and
    when the first was killed (0: it had ended by itself)."""
    words = [sys.executable, *shlex.split(command)[1:]]
    environment = dict(os.environ)
    wait, start = rng.uniform(0, most), time.monotonic()
    with tempfile.TemporaryFile() as log:
        how = {"env": environment, "cwd": ROOT, "stdout": log, "stderr": log}
        process = subprocess.Popen(words, start_new_session=True, **how)
        while not begun.is_file() and process.poll() is None:
            time.sleep(0.2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait)
        early = process.poll() is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if early and process.returncode:
            log.seek(0)
            raise Failed(f"{command}: {process.returncode}\n{log.read().decode()[-3000:]}")
    how = "ended before its kill" if early else "killed"
    print(f"{time.monotonic() - start:6.1f} s  {command}: {how}", flush=True)
    killed = 0.0 if early else time.time()
    return shell(words, environment), killed


def pretend_card() -> None:
    """Where there is no card, this process's models and its children's are on a pretended one,
    unless REHEARSAL_CARD is "none"."""
    import torch

    if torch.cuda.is_available() or os.environ.get("REHEARSAL_CARD", "pretend") != "pretend":
        return
    os.environ["PYTHONPATH"] = os.pathsep.join([str(PRETEND), str(ROOT)])
    sys.path.insert(0, str(PRETEND))
    import pretend_card

    from lavic_utils import loading

    pretend_card.install(loading)
    print(f"models on a pretended card, {loading.device()}", flush=True)


# ---------------------------------------------------------------- the rehearsal
def models(place: Path, revisions: dict[str, str], environment: dict[str, str]) -> None:
    """Every checkpoint by the command that the package (and, for the 7B model, the page) gives."""
    from lavic_utils import methods, retrieval
    from lavic_utils.config import load_profile
    from lavic_utils.hub import HubModel

    paper = load_profile("paper")
    own = HubModel(paper.model, paper.revision, paper.download_gb)
    others = [methods.VICUNA_7B, methods.LLAVA_15]
    others += [one.model for one in retrieval.ENCODERS.values() if one.model]
    page = page_commands(PAGE.read_text(encoding="utf-8"))
    page = [command for command in page if command.startswith("hf download")]
    assert len(page) == 1 and paper.model in page[0] and paper.revision in page[0]
    revisions |= {one.id: one.revision for one in (own, *others)}
    online = environment | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    for command in [page[0], *(one.command for one in others)]:
        words = shlex.split(command)
        shell([str(Path(sys.executable).with_name("hf")), *words[1:]], online)
    missing = [one.id for one in (own, *others) if not one.cached()]
    assert not missing and own.stand_in(paper.model), f"not in the local cache: {missing}"


def published_files(source: Path) -> None:
    """The blob ids of the stand-ins, in this process: `fetch` and `verify` check them as ever."""
    from lavic_utils.remote import download

    download.FILES.update({name: download.blob_id(source / name) for name in download.FILES})


def check_tables(profile: str, methods: list[str]) -> None:
    """Every cell that the paper has, and that ran, stands in the tables, as a rehearsal's."""
    filled = set()
    for table in ("open_source", "proprietary", "ablation"):
        for row in json.loads(lavic(f"{LAVIC}table {table} --profile {profile} --json")):
            if row["ours"]:
                assert row["tier of ours"] == "rehearsal", row
                filled.add((row["method"], row["domain"]))
    missing = {(m, d) for m in methods for d in ("beauty", "fashion", "home")} - filled
    assert not missing, f"no figure for {sorted(missing)}"


def check_claims(results: Path, real: Path | None, replications: Path | None) -> None:
    """Where a rehearsal's rows were committed, they would stand in the claims under a tier of their
    own (and beside the committed rows they are refused: tests/test_audit.py)."""
    if not (real and replications):
        print("          no claims: LAVIC_DATA and LAVIC_REPLICATIONS are not set")
        return
    from lavic_utils.audit import claims

    own = results / "paper" / "metrics.own.json"
    assert json.loads(own.read_text(encoding="utf-8"))["provenance"]["tier"] == "rehearsal"
    shutil.copy(own, own.with_name("metrics.json"))  # as `notebooks execute` leaves it
    rows = [row for row in claims.write_claims(real, replications)["rows"] if row["published"]]
    tiers = {tier for row in rows for tier in {one["tier"] for one in row["ours"]}}
    assert "rehearsal" in tiers and "full run" not in tiers, tiers
    alone = [row for row in rows if {one["tier"] for one in row["ours"]} == {"rehearsal"}]
    assert alone and {row["status"] for row in alone} == {claims.REHEARSAL}


def rehearse(place: Path, rng: random.Random) -> None:
    import server
    import stand_ins

    real, replications = (os.environ.get(name) for name in ("LAVIC_DATA", "LAVIC_REPLICATIONS"))
    source, data, hub = place / "source", place / "data", place / "hub"
    revisions: dict[str, str] = {}
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "results").rglob("*")}
    start = time.monotonic()
    for name, make in stand_ins.HUB.items():
        make(hub / name)
    with server.serving(handler(hub, source, revisions)) as local:
        stand_ins.data_folder(source, local.address, Path(real) if real else None)
        print(f"{time.monotonic() - start:6.1f} s  stand-ins made", flush=True)
        os.environ |= {"LAVIC_DATA": str(data), "LAVIC_DATA_URL": local.address}
        os.environ |= {"HF_ENDPOINT": local.address, "OPENAI_API_KEY": "none"}
        models(place, revisions, dict(os.environ))
        published_files(source)
        commands(place, local.address, rng)
        given = (Path(folder) if folder else None for folder in (real, replications))
        check_claims(place / "results", *given)
    after = {path: path.stat().st_mtime_ns for path in (ROOT / "results").rglob("*")}
    assert before == after, "a rehearsal wrote into the committed results"
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu = sum(one.ru_utime + one.ru_stime for one in used)
    wall = time.monotonic() - start
    print(f"{wall:6.1f} s  in all ({cpu:.0f} s of processor time): 1 passed, 0 failed")


def commands(place: Path, address: str, rng: random.Random) -> None:
    """The page's commands, once as they stand (t4), once with `paper` throughout."""
    import torch
    import yaml

    from lavic_utils.config import DOMAINS, PACKAGE
    from lavic_utils.methods import METHODS, slug

    results = place / "results"
    given = yaml.safe_load((PACKAGE / "profiles" / "t4.yaml").read_text(encoding="utf-8"))
    given["quantize_4bit"] = torch.cuda.is_available()
    small = place / "t4.yaml"
    small.write_text(yaml.safe_dump(given), encoding="utf-8")
    for command in page_commands(PAGE.read_text(encoding="utf-8")):
        if why := left_out(command):
            print(f"          {command}: left out ({why})")
        elif command.startswith("hf "):
            continue  # done
        elif " evaluate " in command:
            answers = sorted((results / "t4" / "answers").glob("lavic*_beauty_test_seed42.jsonl"))
            assert len(answers) == 2
            lavic(f"{LAVIC}evaluate {answers[0]} --against {answers[1]}")
        elif " bench gpu" in command:
            lavic(command, 0 if torch.cuda.is_available() else 2)
        elif " plan " in command:
            lavic(command)
            lavic(command.replace("t4", "paper"))
        elif " run LaViC " in command and "t4" in command:
            begun = results / "t4" / f"seed{SEED}" / "stage1" / "begun.json"
            _, killed = killed_once(command.replace("t4", str(small)), begun, 20, rng)
            done = begun.with_name("result.json")
            seconds = json.loads(done.read_text(encoding="utf-8"))["seconds"]
            started = done.stat().st_mtime - seconds  # the stage goes on from where it was begun
            assert started < killed + 1 or not killed, "stage 1 was begun anew after the kill"
        elif " reproduce " in command:
            begun = results / "paper" / f"seed{SEED}" / "02_self_distillation.log"
            said, killed = killed_once(command, begun, 90, rng)
            kept = f"00_start_here (seed {SEED}): unchanged, not run again"
            assert kept in said or not killed, "notebook 00 was run anew after the kill"
        else:
            lavic(command.replace("t4", str(small)))
    rows = []
    for name, method in METHODS.items():
        service, row = "", name
        if method.family == "proprietary":  # another model's answers stand in a row of their own
            served = f"stand-in-{slug(name)}"
            service = f" --base-url {address}/v1 --served {served}"
            row = f"{served} at {address.removeprefix('http://')} {name.partition(' ')[2]}"
        for domain in DOMAINS:
            lavic(f"{LAVIC}run {shlex.quote(name)} --domain {domain} --profile paper{service}")
        rows.append(row)
    check_tables("paper", rows)


def main() -> int:
    kept = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else None
    place = kept or Path(tempfile.mkdtemp(prefix="rehearsal-"))
    seed = int(os.environ.get("REHEARSAL_SEED") or time.time())
    print(f"rehearsal in {place}; kills drawn with REHEARSAL_SEED={seed}", flush=True)
    os.environ |= {"HF_HOME": str(place / "cache"), "LAVIC_RESULTS": str(place / "results")}
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONHASHSEED": "0"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false"}
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ["PYTHONPATH"] = str(ROOT)
    pretend_card()
    try:
        rehearse(place, random.Random(seed))
    except (Failed, AssertionError) as error:
        print(f"failed: {error}\nkept: {place}", file=sys.stderr)
        return 1
    if not kept:
        shutil.rmtree(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
