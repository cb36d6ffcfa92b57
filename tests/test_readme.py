"""The README says what is there: files, line counts, flags."""
import dataclasses
import re

import evaluate
import runs
import intervene
import miniature
from miniature import pretrain
import speed
import speed_training
import train
from tiny import ROOT

README = (ROOT / "README.md").read_text()


def test_the_file_map_lists_every_module_with_its_length():
    listed = {name: int(n.replace(",", "")) for name, n in re.findall(r"^\| `(\w+\.py)` \|.*\| ([\d,]+) \|$", README, re.M)}
    assert listed == {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("*.py")}


def test_every_flag_of_the_readme_exists():
    known = {f.name for c in (runs.Config, evaluate.Config, intervene.Config, pretrain.Config, speed.Config, speed_training.Config, miniature.Waterbirds)
             for f in dataclasses.fields(c)}
    known |= {f"no_{f.name}" for f in dataclasses.fields(runs.Config) if f.type is bool}
    known |= {"help", "sheet", "nproc_per_node", "seeds", "processes", "also", "list"}               # of argparse alone
    mentioned = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][\w-]*)", README)}
    assert mentioned - known == set()


def test_every_path_of_the_readme_exists():
    for path in re.findall(r"\]\((docs/[^)]+)\)", README) + re.findall(r"`(tests/\w+)`", README):
        assert (ROOT / path).exists(), path
