"""seeds.py: several seeds of several methods -> one table.

    python seeds.py runs/ifam-? runs/erm-?         # folders <name>-<seed> that hold evaluate.py's report.json

Each number is the mean over the seeds and half its 95 % interval (Student's t); a dash where a method has no such number.
"""
import argparse
import json
import math
import re
from pathlib import Path

from settings import UsageError, run_script

T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}   # 97.5 % quantile, by n


def stage(report):
    return report.get("stage2") or report["stage1"]


def place(report, *names):
    found = (report["leakage"] or {}).get("place_of_mask")
    return found and found[names[0]] - (found[names[1]] if names[1:] else 0)


COLUMNS = {     # title: what it is of a report
    "worst group": lambda r: stage(r).get("worst_group"), "accuracy": lambda r: stage(r)["aa"],
    "foreground IoU": lambda r: r.get("localisation", {}).get("foreground_iou"),
    "kept": lambda r: r.get("mask", {}).get("kept_share"),
    "empty": lambda r: r["mask"]["empty"] / r["images"] if "mask" in r else None,
    "repaint, logits": lambda r: r["leakage"] and r["leakage"]["repaint"]["max_logit_change"],
    "late": lambda r: place(r, "late"), "early": lambda r: place(r, "early"),
    "early - late": lambda r: place(r, "early", "late")}


def least(reports):
    worst = [stage(r)["worst_group"] for r in reports if "worst_group" in stage(r)]
    return f"{min(worst):.3f}" if worst else "–"


def interval(values):
    """Mean of numbers and half the width of its 95 % interval; the latter is None for one number or more than ten."""
    n, mean = len(values), sum(values) / len(values)
    if n not in T:
        return mean, None
    return mean, T[n] * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders <name>-<seed> with a report.json")
    methods = {}
    for run in map(Path, parser.parse_args(argv).runs):
        if not (run / "report.json").is_file():
            raise UsageError(f"{run} has no report.json: run evaluate.py --ckpt {run}/best.pt first")
        methods.setdefault(re.sub(r"-\d+$", "", run.name), []).append(json.loads((run / "report.json").read_text()))
    print("| | n | " + " | ".join(COLUMNS) + " | least worst group |\n" + "|---" * (len(COLUMNS) + 3) + "|")
    for name, reports in methods.items():
        cells = [name, str(len(reports))]
        for value in COLUMNS.values():
            values = [value(r) for r in reports]
            if None in values:
                cells.append("–")
                continue
            mean, half = interval(values)
            cells.append(f"{mean:.3f}" + (f" ± {half:.3f}" if half is not None else ""))
        print("| " + " | ".join(cells) + " | " + least(reports) + " |")


if __name__ == "__main__":
    run_script(main)
