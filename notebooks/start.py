"""start.py: what every notebook begins with, out of the reader's sight: paths, which data, models that are trained.

    import start                                         # first: it makes the modules of the repository importable
    test = start.load("waterbirds", "test")              # a split, or several; without names all of them, as a dict
    runs = start.train(["erm", "ifam"], "waterbirds")    # {name: folder of the run}; trained now if it never was
    found = start.once("name", folder, measure)          # what measure() returns, kept in the folder of a run
    start.claim("a sentence", number > 0.5)              # what a notebook says in the end, checked

Data are the miniatures, which are drawn on first use. IFAM_DATA=real in the environment takes the benchmarks
themselves, with the paper's settings: that is days on a laptop. IFAM_FAST=1 is for the tests: everything small, and
what is measured is not claimed.

Floor: above all commands: it calls sweep.finished, as the notebooks themselves do. Nothing needs to be read before.
"""
import contextlib
import io
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path.cwd().name == HERE.name and not Path(HERE.name).is_dir():
    os.chdir("..")                                       # paths are those of the README
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import intervene  # noqa: E402
import sweep  # noqa: E402
from runs import Config, differences, hash_of, preset, read_config  # noqa: E402
from settings import UsageError, parse, write_json, write_whole  # noqa: E402
from weights import read_file  # noqa: E402

FAST = os.environ.get("IFAM_FAST") == "1"
MINI = FAST or os.environ.get("IFAM_DATA", "mini") == "mini"
CLAIMS = MINI and not FAST                               # claims are about the miniatures
if not MINI and os.environ["IFAM_DATA"] != "real":
    raise UsageError(f"IFAM_DATA={os.environ['IFAM_DATA']}: take mini, or real for the benchmarks themselves")


def load(name, *splits):
    """The splits of a benchmark, one or several in the order of their names, or all as a dict; says which data."""
    with contextlib.redirect_stdout(io.StringIO() if MINI else sys.stdout):
        root = data.find_root(name, "data", MINI)
        found = data.load(name, root, 96 if MINI else None, limit=32 * FAST, splits=splits, check=False)
    some = next(iter(found.values()))
    print(f"Data: {'the miniature of ' * MINI}{name}, {some.size} x {some.size} pixels; "
          + ", ".join(f"{len(samples):,} {split}" for split, samples in found.items()) + " images")
    return found if not splits else some if len(splits) == 1 else [found[split] for split in splits]


def train(names, name, *flags, measure=("--leakage", "100"), also=(), folder="sweep", retrain=()):
    """Runs of sweep.py on a benchmark -> {name: folder}. What was trained before is taken as it is; else a bar shows.

    flags: of train.py; measure: of evaluate.py; also: benchmarks for evaluation only; folder: as in sweep.plan;
    retrain: new last layers, whose reports are report-<name>.json.
    """
    if FAST:
        flags, folder = [*flags, "--limit", "32", *["--epochs", "1"] * ("--epochs" not in flags)], f"fast-{folder}"
        measure = ["--leakage", "2"] if also else measure
    mini = ["--mini"] * (MINI and name != "folder")      # pictures of one's own are what they are
    return sweep.finished(names, ["--data", name, *mini, *flags], folder, measure, also, retrain)


def readme_run():
    """The folder of the model that the README trains, if it is there; else ifam of the sweep, which is the same."""
    folder = Path("runs/waterbirds-mini" if MINI else "runs/waterbirds")
    own = parse(Config, "", ["--data", "waterbirds", *["--mini"] * MINI], preset)
    if not FAST and sweep.trained(folder / "log.jsonl") and not differences(read_config(folder / "config.json"), own):
        return folder
    return train(["ifam"], "waterbirds")["ifam"]


def reports(runs, file="report.json"):
    """{name: folder} -> {name: report of evaluate.py}."""
    return {name: json.loads((folder / file).read_text()) for name, folder in runs.items()}


def corrected(run, *flags):
    """What intervene.py decides for a run, given these flags, and what evaluate.py measures -> (file, {title: report}).

    Measured anew only where the files are of another checkpoint or another decision.
    """
    file, ckpt, after = run / "intervention.json", run / "best.pt", run / "report-intervention.json"
    made = json.loads(file.read_text()) if file.is_file() else {}
    if made.get("checkpoint", {}).get("sha256") != hash_of(ckpt) or made.get("asked") != list(flags):
        with contextlib.redirect_stdout(io.StringIO()):
            intervene.main(["--ckpt", str(ckpt), "--out", str(file), *flags])
            made = {**json.loads(file.read_text()), "asked": list(flags)}
            write_json(file, made)
            after.unlink(missing_ok=True)
    if not after.is_file():
        with contextlib.redirect_stdout(io.StringIO()):
            evaluate.main(["--ckpt", str(ckpt), "--leakage", "100", "--intervention", str(file)])
    return made, reports({"untouched": run, "corrected": run}) | {"corrected": json.loads(after.read_text())}


def once(name, run, measure, *settings):
    """What measure() returns: plain types and tensors, kept in the run's folder, so that it is measured only once.

    name: of the file. It is measured anew for another checkpoint, other code of the repository, other data or other
    settings (plain types, what else the numbers depend on), and where the file is damaged. What the notebook's own cell
    does is not compared: whoever changes what it measures gives it another name, or deletes the file.
    """
    file = run / f"measured-{name}.pt"
    folders = [HERE.parent / folder for folder in ("", "benchmarks", "measure", "miniature")]
    code = [hash_of(path) for folder in folders for path in sorted(folder.glob("*.py"))]
    of = {"checkpoint": hash_of(run / "best.pt"), "code": code, "mini": MINI, "fast": FAST, "settings": settings}
    try:
        kept = read_file(file, f"what {name} measured") if file.is_file() else None
    except UsageError:                                   # damaged
        kept = None
    if not isinstance(kept, dict) or kept.keys() != {"of", "found"} or kept["of"] != of:
        kept = {"of": of, "found": measure()}
        write_whole(file, lambda path: torch.save(kept, path))
    return kept["found"]


def leaks(reports):
    """Three measures of the leakage of several models, {measure: {model: number}}, as figures.ladder draws them."""
    found = {name: report["leakage"] for name, report in reports.items() if report["leakage"]}
    return {title: {name: x[test][number] for name, x in found.items()} for title, test, number in (
        ("repaint: largest change of a logit", "repaint", "max_logit_change"),
        ("repaint: predictions flipped", "repaint", "flip_rate"), ("swap: predictions flipped", "swap", "flip_rate"))}


def hides(report):
    """Are both numbers of a report 0 where a hard, early mask guarantees it?"""
    return report["leakage"]["repaint"]["max_logit_change"] == report["leakage"]["gradient"]["max_abs"] == 0


def claim(sentence, holds, measured=True):
    """Say a sentence that the notebook ends with; AssertionError if it does not hold.

    measured: it is a number of the miniature, which small settings and other data need not have.
    """
    if not (measured and not CLAIMS):
        assert holds, sentence
    print(("holds: " if holds else "not claimed here: ") + sentence)
