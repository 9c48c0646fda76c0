"""The ways in: every command on a page exists, the map names every module, licence and citation,
Binder, and Colab's cell."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
import yaml

from lavic_utils.__main__ import app, main
from lavic_utils.bench import memory, plan
from lavic_utils.config import PACKAGE, ROOT, load_profile
from lavic_utils.repro import colab

PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        PACKAGE / "mini_model" / "README.md",
        *(ROOT / "notebooks").glob("*.ipynb"),
    ]
)
PROGRAMS = [ROOT / "Makefile", *(ROOT / ".ci").glob("*")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TARGETS = set(
    re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
)


def text_of(path: Path) -> str:
    """A page's text; of a notebook, its cells' sources."""
    text = path.read_text(encoding="utf-8")
    return (
        text
        if path.suffix != ".ipynb"
        else "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    )


def wrong_commands(text: str, targets: set[str] = TARGETS) -> list[str]:
    """Commands in code spans, blocks and programs that name a sub-command, option or make target
    that does not exist."""
    problems = [
        f"make {target}"
        for target in re.findall(r"(?:^|`)make ([\w-]+)", text, re.M)
        if target not in targets
    ]
    for line in re.findall(r"-m lavic_utils ([^`\n#;|]+)", text.replace("\\\n", " ")):
        command, words = typer.main.get_command(app), shlex.split(line.replace("'", " "))
        while words and hasattr(command, "commands") and not words[0].startswith("-"):
            name = words.pop(0).rstrip(".,:)")
            command = command.commands.get(name)
            if command is None:
                problems += (
                    [f"{line.strip()}: no command {name}"] if name else []
                )  # "...": any command is meant
                break
        options = getattr(command, "params", ())
        known = {
            "--help",
            *(name for option in options for name in (*option.opts, *option.secondary_opts)),
        }
        problems += [
            f"{line.strip()}: no option {word}"
            for word in words
            if command and word.startswith("--") and word.split("=")[0].rstrip(".,:)") not in known
        ]
    return problems


@pytest.mark.parametrize("page", [*PAGES, *PROGRAMS], ids=lambda path: path.name)
def test_every_command_on_a_page_exists(page):
    assert wrong_commands(text_of(page)) == []


def test_a_wrong_command_is_found():
    text = (
        "`make nothing`, `make test`\n```\nmake also-nothing\n"
        "python -m lavic_utils data crawl --first-only --no-such\n"
        "python -m lavic_utils nothing\npython -m lavic_utils data nothing\n"
        "python -m lavic_utils run LaViC --domain home\n"
        "accelerate launch --config_file x.yaml \\\n  -m lavic_utils run LaViC --domian home\n```"
    )
    found = wrong_commands(text)
    assert [line.split(": ")[-1] for line in found] == [
        "make nothing",
        "make also-nothing",
        "no option --no-such",
        "no command nothing",
        "no command nothing",
        "no option --domian",
    ]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.suffix == ".md"], ids=lambda path: path.name
)
def test_every_file_that_a_page_links_to_is_there(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_citation_agrees_with_the_project_and_the_paper():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper = json.loads((PACKAGE / "published.json").read_text(encoding="utf-8"))["paper"]
    preferred = found["preferred-citation"]
    assert found["cff-version"] == "1.2.0" and str(found["version"]) == PROJECT["version"]
    assert found["license"] == PROJECT["license"]["text"]
    assert {"message", "title", "authors", "type"} <= set(found) and {
        "authors",
        "type",
        "year",
    } <= set(preferred)
    assert preferred["title"] == paper["title"]
    assert {"type": "other", "value": f"arXiv:{paper['arxiv']}"}.items() <= preferred[
        "identifiers"
    ][0].items()


def test_the_licence_is_the_one_pyproject_names():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"]["text"] == "Apache-2.0"
    assert (
        "Apache License" in text
        and "Version 2.0, January 2004" in text
        and "END OF TERMS AND CONDITIONS" in text
    )


def test_binder_installs_the_lock_with_the_python_of_environment_yml():
    conda = [
        yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
        for name in ("environment.yml", "binder/environment.yml")
    ]
    assert (
        conda[0]["dependencies"][:2] == conda[1]["dependencies"]
        and conda[0]["channels"] == conda[1]["channels"]
    )
    script = ROOT / "binder" / "postBuild"
    text = script.read_text(encoding="utf-8")
    assert (
        os.access(script, os.X_OK)
        and subprocess.run(["bash", "-n", script], check=False).returncode == 0
    )
    assert "-r requirements.lock" in text and wrong_commands(text) == []


def test_colab_keeps_its_torch_and_its_kernel():
    names = {re.split(r"[^\w.-]", line)[0] for line in colab.wanted()}
    assert {"transformers", "peft", "papermill"} <= names and not names & colab.STAY
    assert names | colab.STAY == {re.split(r"[^\w.-]", line)[0] for line in PROJECT["dependencies"]}


def first_cell(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


CELL = first_cell(ROOT / "notebooks" / "00_start_here.ipynb") + "\n"


def test_every_notebook_begins_with_the_same_short_cell():
    assert len(CELL.splitlines()) <= 8 and "colab.py" in CELL
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert first_cell(path).strip() == CELL.strip(), path.name


@pytest.fixture
def bare(tmp_path):
    """A virtual environment with every package but lavic_utils; runs a text as an IPython file in
    the folder beside it."""
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    inside = sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env")})
    Path(inside, "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")

    def run(text: str, **variables: str) -> subprocess.CompletedProcess:
        (tmp_path / "cell.ipy").write_text(text, encoding="utf-8")
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHONPATH", "LAVIC_REPOSITORY")
        }
        kept |= {"IPYTHONDIR": str(tmp_path / "ipython"), **variables}
        return subprocess.run(
            [python, "-m", "IPython", "--no-banner", "--colors=NoColor", "cell.ipy"],
            cwd=tmp_path,
            text=True,
            capture_output=True,
            env=kept,
            check=False,
        )

    return run


def test_the_first_cell_clones_and_installs_where_nothing_is_installed(bare, tmp_path):
    """A repository made of this checkout; pip finds every package there, so nothing is
    downloaded."""
    source = tmp_path / "source"
    shutil.copytree(
        PACKAGE, source / "lavic_utils", ignore=shutil.ignore_patterns("mini_model", "__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", source)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", source]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    told = "\nimport lavic_utils.config as c\nprint('at', os.path.relpath(c.ROOT, os.getcwd()))\n"
    failed = bare(CELL + told, LAVIC_REPOSITORY=f"file://{tmp_path}/nowhere")
    assert (
        failed.returncode
        and "colab.py` not found" in failed.stdout.replace("'", "")
        and "not appear to be" in failed.stderr
    )
    done = bare(CELL + told, LAVIC_REPOSITORY=f"file://{source}", PIP_NO_INDEX="1")
    assert done.returncode == 0 and done.stdout.strip() == "at .", done.stdout + done.stderr
    stub = (
        tmp_path / "stub" / "pip" / "__main__.py"
    )  # as after a restart: nothing is asked or cloned, pip is called
    stub.parent.mkdir(parents=True)
    (stub.parent / "__init__.py").touch()
    stub.write_text("import sys; print(sys.argv[1])", encoding="utf-8")
    again = bare(CELL + told, PYTHONPATH=str(tmp_path / "stub"))
    assert again.returncode == 0 and again.stdout.split() == ["install", "at", "."], (
        again.stdout + again.stderr
    )


def test_the_first_cell_does_nothing_where_lavic_utils_can_be_imported(bare):
    done = bare(CELL + "\nprint(os.listdir('.'))", PYTHONPATH=str(ROOT), PATH="")
    assert (
        done.returncode == 0 and "'env'" in done.stdout and "lavic-companion" not in done.stdout
    ), done.stdout + done.stderr


def test_sections_that_a_plan_names_are_there():
    """A row of a plan that quotes a section ends in: `NN, "Section" to "Section"`."""
    rows = [
        re.search(r'\| (\d\d), (".*") \|$', line)
        for line in (ROOT / "docs" / "teaching.md").read_text().splitlines()
    ]
    named = [(row[1], title) for row in rows if row for title in re.findall(r'"([^"]+)"', row[2])]
    assert len(named) > 5
    for number, title in named:
        book = next((ROOT / "notebooks").glob(f"{number}_*.ipynb"))
        headings = [
            line.lstrip("# ")
            for cell in json.loads(book.read_text(encoding="utf-8"))["cells"]
            if cell["cell_type"] == "markdown"
            for line in "".join(cell["source"]).splitlines()
            if line.startswith("#")
        ]
        assert title in headings, (
            f"teaching.md names {title!r}, which notebook {number} does not have"
        )


@pytest.mark.parametrize("name", ["paper", "t4"])
def test_the_memory_that_the_researchers_page_copies_is_what_plan_says(name):
    found = memory.memories(load_profile(name))
    peak = max(parts["total"] for stage, parts in found.items() if stage in memory.STAGES)
    rows = [
        line
        for line in (ROOT / "docs" / "researcher.md").read_text().splitlines()
        if line.startswith(f"| `{name}`")
    ]
    assert len(rows) == 2 and all(f"| {peak:.1f} GiB + 1" in row for row in rows)


def test_what_the_researchers_page_says_of_card_and_disk_is_in_the_files():
    page = " ".join((ROOT / "docs" / "researcher.md").read_text(encoding="utf-8").split())
    files = [ROOT / f"results/bench/nvidia-h200-{name}-gpu.json" for name in ("paper", "t4")]
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    good = [case["ratio"] for one in found for case in one["steps"]]
    assert max(abs(1 - ratio) for ratio in good) < 0.04 and "within 4 %" in page
    bad = [case for one in found for case in one["without_autocast"]]
    lost = [case for case in bad if case["out_of_memory"]]
    cap = found[1]["cap_gb"] * 1e9 / memory.GIB
    surprise = [case for case in lost if case["predicted_gib"] < cap]
    assert f"{len(bad)} more cases" in page and f"{len(lost)} ran out of memory" in page
    assert f"{len(bad) - len(lost)} of them lie from 7 % below to 13 % above" in page
    ratios = [round(100 * case["ratio"] - 100) for case in bad if case["ratio"]]
    assert (min(ratios), max(ratios)) == (-7, 13) and len(surprise) == 1
    told = f"(13.97 GiB), where {surprise[0]['predicted_gib']:.2f} GiB were foreseen"
    assert f"{cap:.2f}" == "13.97" and told in page and f"{surprise[0]['tokens']} tokens" in page
    peak = next(case for case in bad if case["name"] == "stage 1, longest text")["measured_gib"]
    assert peak > plan.CARDS["a100"].gib and f"{peak:.1f} GiB and not 37.2" in page
    for name in ("paper", "t4"):
        profile = load_profile(name)
        answers = memory.memories(profile)[memory.LONG[1]]["total"]
        assert f"{answers:.1f}{' GiB' if name == 'paper' else ''} in `{name}`" in page
        disk = sum(plan.disk_gb(profile, plan.work(profile)).values())
        assert f"disk {disk:.1f} GB" in page
    stage = load_profile("paper").distillation.model_copy(update={"gradient_checkpointing": True})
    needs = memory.memories(load_profile("paper").model_copy(update={"distillation": stage}))
    assert f"{max(needs[one]['total'] for one in memory.STAGES if one in needs):.1f} GiB" in page


def test_a_dry_run_without_a_card_is_the_refusal_that_the_pages_name(monkeypatch, capsys):
    monkeypatch.setattr(plan.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(plan, "virtual_memory", lambda: SimpleNamespace(total=16 * memory.GIB))
    words = ["run", "LaViC", "--domain", "beauty", "--dry-run", "--profile"]
    for name, said in (("paper", "no card is here"), ("t4", "needs a CUDA card")):
        assert main([*words, name]) == 2 and said in capsys.readouterr().err
    for page in ("README.md", "docs/researcher.md"):
        assert re.search(r"--dry-run`[^.]*\brefus", (ROOT / page).read_text(encoding="utf-8"))


def test_the_wheel_has_the_readme_and_addresses_and_works_where_it_is_run(tmp_path):
    """What pip builds of this checkout, unpacked elsewhere and run in a third folder."""
    wheels, site, place = (tmp_path / name for name in ("wheels", "site", "place"))
    source = tmp_path / "source"
    shutil.copytree(PACKAGE, source / "lavic_utils", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", wheels, source], check=True)
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    about = next(site.glob("*.dist-info"))
    metadata = (about / "METADATA").read_text(encoding="utf-8")
    assert (
        "\n# LaViC companion\n" in metadata
        and "Description-Content-Type: text/markdown" in metadata
    )
    for address in PROJECT["urls"].values():
        assert f", {address}\n" in metadata
    assert "lavic = lavic_utils.__main__:main" in (about / "entry_points.txt").read_text()
    place.mkdir()
    asked = (
        "from lavic_utils import config; from lavic_utils.__main__ import main; "
        "print(config.results_dir(config.load_profile('mini')).resolve()); main(['--version'])"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LAVIC")}
    told = subprocess.run(
        [sys.executable, "-c", asked],
        cwd=place,
        env={**environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert told[0] == str(place.resolve() / "results" / "mini")
    assert told[1].startswith(f"lavic {PROJECT['version']}, content hash of the code ")


def test_the_command_completes_in_a_shell(monkeypatch, capsys):
    monkeypatch.setenv("_LAVIC_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "lavic cla")
    monkeypatch.setenv("COMP_CWORD", "1")
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().out.split() == ["claims"]


def test_no_page_or_message_names_the_project_on_pypi():
    """Nobody holds the name there: whoever takes it could serve anything."""
    texts = [*PAGES, *PACKAGE.rglob("*.py"), ROOT / "Makefile"]
    assert [p.name for p in texts if re.search(r"pip install .{0,9}lavic", text_of(p))] == []


def dry(place: Path, *asked: str) -> str:
    """What `make` would do in a folder where nothing is installed."""
    for name in ("Makefile", "requirements.lock", "requirements-demo.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, place)
    (place / "docs").mkdir(exist_ok=True)
    shutil.copy(ROOT / "docs" / "requirements.lock", place / "docs")
    command = ["make", "-n", *asked]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, check=True).stdout


def test_the_development_container_installs_what_the_pages_commands_use(tmp_path):
    found = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    python = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    done = dry(tmp_path, *found["postCreateCommand"].removeprefix("make ").split())
    for target in ("install", "demo", "book", "slides"):  # nothing is left for their first call
        wanted = [line for line in dry(tmp_path, target, "TORCH=cpu").splitlines() if "pip" in line]
        assert wanted and [line for line in wanted if line not in done] == []
    settings = found["customizations"]["vscode"]["settings"]
    assert settings["python.defaultInterpreterPath"].endswith("/.venv/bin/python")
    assert f"python={found['image'].rpartition(':')[2]}" in python["dependencies"]


def test_the_changelog_knows_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {PROJECT['version']}\n" in text and "\n## Unreleased\n" in text


def test_what_an_installation_weighs_is_the_same_everywhere():
    from lavic_utils.repro.doctor import INSTALLED_GB

    for page in (ROOT / "README.md", ROOT / "docs" / "student.md"):
        text = page.read_text(encoding="utf-8")
        assert f"{INSTALLED_GB} GB" in text and "2.7 GB" in text and "TORCH=cpu" in text


def test_torch_for_cpus_alone_is_one_word_for_make(tmp_path):
    index = "--index-url https://download.pytorch.org/whl/cpu"
    for words, cpu in ((["install"], False), (["reproduce", "TORCH=cpu"], True)):
        lines = [line for line in dry(tmp_path, *words).splitlines() if "grep '^torch==" in line]
        assert len(lines) == 1 and (index in lines[0]) == cpu
    assert index in (ROOT / "binder" / "postBuild").read_text(encoding="utf-8")
