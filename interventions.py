"""interventions.py: what intervene.py decided, in its file: read, checked, applied to a model, said in a line.

    taken = apply_intervention(model, "runs/x/intervention.json", "runs/x/best.pt")      # model.selector is set to it
    print(describe_intervention(taken, "waterbirds", ["test"]))

Floor: what a run is. Read runs.py (checkpoints) and ifam.refuse (what an intervention does to a model) first.
"""
import json
import math
from pathlib import Path

import torch

import data
from ifam import SCORES, limits_of
from runs import hash_of, wrong_field
from settings import UsageError

# What thresholds are called in an intervention.json. A file without a score is from before there were several.
THRESHOLDS = {"distance": "squared_distances", "margin": "margins", "cosine": "cosine_distances"}


def apply_intervention(model, path, ckpt):
    """Set a model to the intervention in a file, if it was made for this checkpoint -> its content, for the report.

    UsageError for a file that is not there, not as intervene.py writes it, or made for another checkpoint.
    """
    if model.selector is None:
        raise UsageError(f"--intervention: {ckpt} is of a method without parts; leave it out")
    k = model.selector.k
    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; make it with intervene.py --ckpt {ckpt}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged, or not a file of intervene.py ({error}); make it again") from None
    fault = wrong_field(content, [("checkpoint.sha256", lambda x: isinstance(x, str) and len(x) == 64, "64 digits")])
    if not fault and content["checkpoint"]["sha256"] != hash_of(ckpt):
        made_for = content["checkpoint"]
        raise UsageError(f"{path} is an intervention on another checkpoint ({str(made_for.get('path'))[:200]}, sha256 "
                         f"{made_for['sha256'][:12]}), not on {ckpt}: its parts are not these; make one with "
                         f"intervene.py --ckpt {ckpt}")
    if fault := fault or wrong_field(content, fields_of_intervention(content, k)):
        raise UsageError(f"{path} is not as intervene.py writes it: {fault}; make it again")
    thresholds, score = content["thresholds"], content.setdefault("score", "distance")
    if thresholds is not None:                           # a margin is what a patch must have, others what it may have
        sign = -1 if score == "margin" else 1
        thresholds = torch.tensor([math.inf if t is None else sign * t for t in thresholds])
    model.selector.score = score
    model.selector.limits = limits_of(k, content["drop"], thresholds).to(model.selector.prototypes.device)
    kept = ("drop", "q", "score", "thresholds", "calibration", "decision")
    return {"file": str(path), **{key: content[key] for key in kept}}


def fields_of_intervention(content, k):
    """What holds of an intervention.json for a model of k parts, for wrong_field: types and bounds, then what agrees.

    A test may read the fields before its own. content: what is in the file, a dict.
    """
    whole = lambda x, least=0: type(x) is int and x >= least
    number = lambda x: type(x) in (int, float) and 0 <= x < math.inf
    of_parts = lambda x, holds: isinstance(x, list) and len(x) == k and all(map(holds, x))
    limits = lambda x: of_parts(x, lambda t: t is None or number(t))
    parts = lambda x: isinstance(x, list) and all(whole(p) and p < k for p in x) and len(set(x)) == len(x)
    known = lambda x: isinstance(x, str) and data.benchmark_of(x) in data.BENCHMARKS
    some, q = f"numbers of parts, 0 to {k - 1}, each once", content.get("q")
    score = content.get("score", "distance")
    calibrated = f"calibration.{THRESHOLDS[score] if score in SCORES else ''}"
    measured_on = lambda where: [
        (f"{where}.data", known, "the name of a benchmark"),
        (f"{where}.split", lambda x: isinstance(x, str) and x in data.SPLITS, "the name of a split"),
        (f"{where}.images", lambda x: whole(x, 1), "a number of images")]
    fields = [
        ("drop", lambda x: parts(x) and len(x) < k, f"{some}, and not all of them"),
        ("q", lambda x: x is None or number(x) and 0 < x < 1, "null or a number between 0 and 1"),
        *[("score", lambda x: x in SCORES, f"one of {', '.join(SCORES)}")] * ("score" in content),
        *measured_on("decision"),
        ("decision.tolerance", number, "a number of at least 0"),
        ("decision.parts_by_hand", parts, some), ("decision.parts_by_rule", parts, some),
        ("drop", lambda x: x == sorted(content["decision"]["parts_by_hand"] + content["decision"]["parts_by_rule"]),
         "those of decision"),
        ("decision.q_by", lambda x: x is None if q is None else x in ("hand", "rule"),
         "null if q is, else hand or rule"),
        ("rows", lambda x: isinstance(x, list) and [content["drop"], q] in [
            [row.get("drop"), row.get("q")] for row in x if isinstance(row, dict)], "a row of what was decided")]
    if q is None:
        return [*fields, ("thresholds", lambda x: x is None, "null without q")]
    return [
        *fields, *measured_on("calibration"),
        ("calibration.patches", lambda x: of_parts(x, whole), f"{k} numbers of patches"),
        (calibrated, lambda x: isinstance(x, dict) and all(map(limits, x.values())),
         f"{k} numbers or nulls for each q"),
        ("thresholds", lambda x: x == content["calibration"][THRESHOLDS[score]].get(str(q)), f"{calibrated} at {q}"),
        ("calibration.patches", lambda x: [n == 0 for n in x] == [t is None for t in content["thresholds"]],
         "0 where, and only where, there is no threshold"),
        ("decision.q_by", lambda x: (x == "hand") == (len(content["calibration"][THRESHOLDS[score]]) == 1),
         "hand for one quantile, rule for several")]


def chosen_on(decision):
    """The split whose numbers led to an intervention: "val", "test", or "" where none did."""
    looked = decision["parts_by_rule"] or decision["parts_by_hand"] or decision["q_by"] == "rule"
    return decision["split"] if looked else ""


def describe_intervention(content, name="", splits=()):
    """One line about an intervention, which says so if it was chosen on images that are measured now.

    splits: those that are measured. All but val are of the test set, which test_and_val shares with val. A benchmark
    for evaluation only shows the objects of the test set of the one it belongs to.
    """
    decision, where = content["decision"], chosen_on(content["decision"])
    parts = f"parts removed: {', '.join(map(str, content['drop'])) or 'none'}"
    score = content.get("score", "distance")
    by = {"distance": "", "margin": " of the margin over the background", "cosine": " of the cosine"}[score]
    tokens = "patches removed: " + ("none" if content["q"] is None else f"beyond the quantile {content['q']}{by}")
    shared = [s for s in splits if (s in ("val", "test_and_val") if where == "val" else s != "val")]
    same = decision["data"] == name or where == "test" and family(decision["data"]) == family(name)
    biased = where and shared and same
    return f"{parts}; {tokens}" + (f"; CHOSEN ON {where.upper()}: too good in {', '.join(shared)}" if biased else "")


def family(name):
    """"waterbird200-mini" -> "cub": the benchmark whose objects it shows; a folder of one's own is its own."""
    known = data.benchmark_of(name)
    return name and (known == "folder" and name or data.BENCHMARKS[known].trained_on or known)
