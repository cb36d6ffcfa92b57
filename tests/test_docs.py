"""README.md and docs/*.md say what is there: commands and their flags, paths and links, the map, generated tables."""
import dataclasses
import re
import shlex
from pathlib import Path

import pytest

import baselines
import compose
import data
import evaluate
import groups
import intervene
import predict
import miniature
import runs
import settings
import speed
import sweep
from measure import figures, tables
from miniature import pretrain
from tiny import ROOT

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text()
         for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES["README.md"]
every_page = pytest.mark.parametrize("page", PAGES)

MODULES = ["measure", "benchmarks", "miniature", "notebooks"]         # folders of modules, beside the root
EXTRA = {"data", "out", "sheet"}                         # of python -m miniature, beside the knobs of a benchmark
TORCHRUN = {"nproc_per_node", "nnodes", "node_rank", "standalone"}
MADE = {"data.docs_table()": lambda: data.docs_table(),  # what the markers "made by" stand for
        "settings.flags_table(runs.Config)": lambda: settings.flags_table(runs.Config)}


# ---------------------------------------------------------------- what scripts know
def flags(cls):
    """The flags of a dataclass of opt()s, as they are typed and without the two dashes."""
    found = set()
    for f in dataclasses.fields(cls):
        if not f.metadata.get("positional"):
            name = f.name.replace("_", "-")
            found |= {name, f"no-{name}"} if f.type is bool else {name}
    return found


CONFIGS = {"data.py": [data.Config], "train.py": [runs.Config], "evaluate.py": [evaluate.Config], "groups.py": [groups.Config], "intervene.py": [intervene.Config], "predict.py": [predict.Config],
           "compose.py": [compose.Config],
           "speed.py": [speed.Config], "sweep.py": [sweep.Config, runs.Config], "measure.tables": [tables.Config],
           "measure.figures": [figures.Config], "miniature.pretrain": [pretrain.Config],
           "miniature": list(miniature.BENCHMARKS.values())}
FLAGS = {script: {"help"}.union(*map(flags, classes)) for script, classes in CONFIGS.items()}
FLAGS["miniature"] |= EXTRA
FLAGS["train.py"] |= {"config"}


def choices(script, flag):
    """The values that a flag of a script may have, or None where there is no list of them."""
    for f in (f for cls in CONFIGS[script] for f in dataclasses.fields(cls)):
        if f.name == flag.replace("-", "_"):
            return f.metadata["choices"]
    return tuple(miniature.BENCHMARKS) if (script, flag) == ("miniature", "data") else None


# ---------------------------------------------------------------- what pages say
def blocks(text, language=r"\w*"):
    """The contents of the fenced blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def spans(text):
    """The code spans of a page, outside its fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))


def commands(text):
    """Command lines of a page that run Python -> [(script or module, the words after it)]."""
    lines = [line for block in blocks(text, "(?:bash)?") for line in block.replace("\\\n", " ").splitlines()]
    found = []
    for line in [*lines, *spans(text)]:
        if re.match(r"python -c ", line):
            continue
        for part in re.split(r"&&|;", re.sub(r"(^|\s)#.*", "", line)):
            if match := re.match(r"\s*(?:\w+=\S+ )*(python|torchrun) (.+)", part):
                words = shlex.split(match[2])
                while match[1] == "torchrun" and words[0].startswith("-"):
                    assert words.pop(0).lstrip("-").split("=")[0] in TORCHRUN, line
                if words[0] == "-m":
                    words.pop(0)
                found.append((words[0], words[1:]))
    return found


def slugs(text):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def modules():
    """Every module of the repository, but for tests and what a package is made of."""
    paths = [*ROOT.glob("*.py"), *(p for folder in MODULES for p in (ROOT / folder).glob("*.py"))]
    return {path.relative_to(ROOT).as_posix() for path in paths if not path.name.startswith("__")}


# ---------------------------------------------------------------- commands and flags
@every_page
def test_every_command_is_one_of_a_script_and_has_flags_of_that_script(page):
    for script, words in commands(PAGES[page]):
        if script == "pytest":
            continue
        assert script in FLAGS, f"{page}: no script {script}"
        for word, following in zip(words, [*words[1:], ""]):
            if word.startswith("--"):
                flag, _, value = word[2:].partition("=")
                assert flag in FLAGS[script], f"{page}: {script} has no flag {word}"
                known = choices(script, flag)
                if known and (value or following).isidentifier():
                    assert (value or following) in known, f"{page}: {script} {word} {following}"


@every_page
def test_every_run_and_set_of_a_sweep_exists(page):
    for script, words in commands(PAGES[page]):
        if script == "sweep.py":
            names = words[:next((i for i, word in enumerate(words) if word.startswith("-")), len(words))]
            assert not names or sweep.choose(names)


@every_page
def test_every_flag_that_is_mentioned_exists(page):
    known = set().union(*FLAGS.values(), TORCHRUN)
    text = re.sub(r"\]\([^)]*\)|https?://\S+|pip install .*", "", PAGES[page])    # no flags of ours
    for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text):
        if flag.endswith("-"):                           # `--weight-...`: a family of flags
            assert any(name.startswith(flag) for name in known), f"{page}: --{flag}"
        else:
            assert flag in known, f"{page}: --{flag}"


def test_the_blocks_that_the_gate_reads_are_there():
    for name in ("main", "tests"):
        assert re.search(rf"^<!-- ci: {name} -->\n```bash\n.+?\n```$", README, re.M | re.S)
    assert re.search(r"^python train\.py .*--mini$", README, re.M)                # .ci/run makes it smaller
    assert "run: .ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


# ---------------------------------------------------------------- paths and links
@every_page
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.M | re.S)):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            there = (ROOT / page).parent / path if path else ROOT / page
            assert there.exists(), f"{page}: {target}"
            assert not anchor or anchor in slugs(there.read_text()), f"{page}: {target}"


@every_page
def test_every_path_of_the_repository_that_is_mentioned_exists(page):
    folders = "|".join([*MODULES, "docs", "notebooks", "tests"])
    for span in spans(PAGES[page]):
        for path in re.findall(rf"^(?:{folders})/[\w./-]*$", span):
            assert (ROOT / path).exists(), f"{page}: {path}"
        for name in re.findall(r"^[\w/]+\.py$", span):
            places = [ROOT, *(ROOT / folder for folder in (*MODULES, "tests"))]
            assert any((place / name).is_file() for place in places), f"{page}: {name}"


def test_the_readme_leads_to_every_page_and_every_notebook():
    linked = set(re.findall(r"\]\(([^)\s#]+)", README))
    assert {page for page in PAGES if page != "README.md"} <= linked
    assert {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")} <= linked


# ---------------------------------------------------------------- the map, the length, the tables
def test_the_map_names_every_module():
    section = re.search(r"^## Map\n(.*?)^## ", README, re.M | re.S)[1]
    listed = set()
    for room, text in re.findall(r"^\| `([\w/.]+)` \| (.*) \|$", section, re.M):
        listed |= {room + name for name in re.findall(r"`(\w+\.py)`", text)} if room.endswith("/") else {room}
    assert listed == modules()


def test_no_folder_of_modules_is_forgotten():
    there = {path.parent.name for path in ROOT.glob("[!.]*/*.py")} - {"tests"}
    assert there == set(MODULES)


def test_the_readme_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 200


@every_page
def test_every_table_that_a_command_makes_is_what_it_makes(page):
    marked = re.findall(r"^<!-- made by: (.+?) -->\n(.*?)^<!-- end -->$", PAGES[page], re.M | re.S)
    assert len(marked) == PAGES[page].count("<!-- made by:") == PAGES[page].count("<!-- end -->")
    for command, text in marked:
        assert text.strip() == MADE[command]().strip(), f'{page}: paste what {command} returns between the markers'


def test_all_tables_that_are_made_are_in_the_docs():
    marked = re.findall(r"^<!-- made by: (.+?) -->$", "\n".join(PAGES.values()), re.M)
    assert sorted(marked) == sorted(MADE)


# ---------------------------------------------------------------- examples and citation
def test_the_python_examples_run(tmp_path):
    cfg = runs.Config(**{**runs.preset({"mini": True}), "mini": True})
    runs.save(tmp_path / "best.pt", 0, cfg, 0, {"split": "val", "epoch": 0, "accuracy": None}, {"model": baselines.build(dataclasses.asdict(cfg), classes=2)})
    root = data.find_root("waterbirds", "data", mini=True)
    samples = data.load("waterbirds", root, cfg.size, limit=1, splits=["test"])["test"]
    given = {"runs/waterbirds-mini/best.pt": tmp_path / "best.pt", "bird.jpg": samples.paths[0],
             **{name: tmp_path / name for name in ("model.pt2", "best.safetensors")}}
    examples = [code for page in PAGES.values() for code in blocks(page, "python")]
    assert len(examples) >= 3
    for code in examples:
        for name, path in given.items():
            code = code.replace(name, Path(path).as_posix())
        exec(code, {})


def test_the_readme_and_the_citation_file_name_the_same_paper():
    title = re.search(r"title\s*= \{(.+?)\}", README)[1]
    cff = (ROOT / "CITATION.cff").read_text()
    assert f'title: "{title}"' in cff
    for author in re.search(r"author\s*= \{(.+?)\}", README)[1].split(" and "):
        family, given = author.split(", ")
        assert re.search(rf'family-names: {family}\n\s+given-names: "?{given}"?\n', cff), author
