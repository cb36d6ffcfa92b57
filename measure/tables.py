"""measure/tables.py: reports of many runs -> the layout of the paper's tables, as Markdown, LaTeX, csv and JSON.

    python -m measure.tables runs/waterbirds-mini-sweep/*                  # Markdown on the terminal
    python -m measure.tables runs/*-sweep/* --out tables/all               # also tables/all.md, .tex, .csv and .json

Floor: measuring. Read evaluate.py before (what a report says) and runs.py (what a run's settings are). One table for
each benchmark, split and number of images, a row for each method with what was changed in its settings, for each
correction by intervene.py and for each last layer of evaluate.py --retrain. Two or three training seeds are printed
from least to best; of more, the mean and half its 95 % interval (Student's t); a dash where there is no such number.
Each folder holds the config.json of train.py and the report*.json of evaluate.py; one that has none yet is named and
left out.
"""
import json
import math
import re
import sys
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path

import data
from baselines import GIVEN, SEGMENT
from interventions import chosen_on
from measure.retrain import TITLES
from objectives import MAKES
from runs import Config as RunConfig
from runs import differences, of_best, preset, read_config, read_log, usual_recipe
from settings import (UsageError, flag, may_write, opt, parse, read_json, run_script, write_csv, write_json,
                      write_whole)

# 97.5 % quantile of Student's t for n = 2, 3, ... numbers
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
     2.110, 2.101, 2.093)
DASH = "–"                 # where a row has no such number
FEW = 3                    # so many seeds are listed: t makes an interval of them that a share cannot have


# ---------------------------------------------------------------- columns: what a table takes from a report
def stage(report):
    """The stage that counts: the second, where there is one."""
    return report.get("stage2") or report["stage1"]


def part(name, metric):
    """A metric on another set of the benchmark."""
    return lambda report: stage(report.get("sets", {}).get(name) or {"stage1": {}}).get(metric)


def bg_gap(report):
    return report.get("bg_gap", {}).get("stage2" if "stage2" in report else "stage1")


def place(report, *names):
    """The clean contrast of evaluate.py: its number for one place of the mask, less that for another."""
    found = (report["leakage"] or {}).get("place_of_mask")
    return found and found[names[0]] - (found[names[1]] if names[1:] else 0)


def shape(name):
    """How well the place is read from one property of the mask; see measure/shape.py."""
    return lambda report: (((report["leakage"] or {}).get("probe") or {}).get("shape") or {}).get(name)


def between(report):
    """How much more of another part's attribute the representation of a part holds after attention over all parts."""
    found = (report["leakage"] or {}).get("between_parts", {})
    return found.get("stage2", found.get("stage1", {})).get("difference")


COLUMNS = {     # title: what it is of a report; a column that no row has is left out
    "worst group": lambda r: stage(r).get("worst_group"),
    "worst rare group": lambda r: stage(r).get("worst_group_rare"),
    "accuracy": lambda r: stage(r).get("aa"), "AUROC": lambda r: stage(r).get("auroc"),
    "worst group AUROC": part("robust", "auroc"), "mixed-same": part("mixed_same", "aa"),
    "mixed-rand": part("mixed_rand", "aa"), "BG-GAP": bg_gap,
    "foreground IoU": lambda r: r.get("localisation", {}).get("foreground_iou"),
    "kept": lambda r: r.get("mask", {}).get("kept_share"),
    "empty": lambda r: r["mask"]["empty"] / r["images"] if "mask" in r else None,
    "repaint, logits": lambda r: r["leakage"] and r["leakage"]["repaint"]["max_logit_change"],
    "swap: flipped": lambda r: r["leakage"] and r["leakage"]["swap"]["flip_rate"],
    "parts agree": lambda r: r.get("parts", {}).get("agreement", {}).get("share"), "between parts": between,
    "late": lambda r: place(r, "late"), "early": lambda r: place(r, "early"),
    "early - late": lambda r: place(r, "early", "late"),
    # how much a mask may tell: the place, read from the mask alone and from what the mask is made of
    **{f"mask tells, {title}": shape(name) for title, name in (
        ("all", "mask"), ("area", "area"), ("position", "position"), ("centred", "centred"), ("largest", "largest"),
        ("largest centred", "largest_centred"), ("removed", "removed"), ("true mask", "true_mask"))},
    "encoding": lambda r: r.get("encoding", {}).get("encoding"),
    "encoding beyond true mask": lambda r: r.get("encoding", {}).get("beyond_true", {}).get("difference")}


# ---------------------------------------------------------------- the paper's numbers
# Tables 1 to 5 and 7: real data, full size (ViT-B/14), in percent. {benchmark: (columns, {row: numbers})}; a row that
# ends in @K is of that number of parts; those of iFAM itself are in data.BENCHMARKS. The paper's fine-tuned DINOv2 is
# erm here, its worst group on Waterbirds that of the rare groups. Of the two quantiles of Tables 3 and 7 our copy lost
# the values: Figure 4 names 99 % and 97 %, the text says of which numbers the threshold is stricter. On ImageNet its
# DINOv2 row has no mark for fine-tuning, and the accuracy that DINOv2 publishes for a linear probe: it is frozen here.
PAPER = {
    "waterbirds": (("accuracy", "worst rare group"), {
        "early-truth": (99.2, 97.2), "late-truth": (95.7, 84.0), "frozen": (95.9, 88.5), "erm": (98.6, 95.8),
        "late-found": (95.3, 83.3), "ep": (96.0, 91.0), "aim": (97.6, 93.9), "pdiscoformer@8": (94.2, 84.3),
        "early-found": (98.6, 95.2), "frozen + PCA probe": (97.4, 94.0), "erm --masktune": (93.0, 86.4),
        "erm --objective group-dro": (91.8, 90.6),
        "ifam + patches q 0.97@16": (98.7, 96.6), "ifam + patches q 0.99@16": (98.8, 97.4)}),
    "metashift": (("accuracy", "worst group"), {
        "frozen": (83.2, 72.6), "erm": (84.7, 76.8), "late-found": (82.3, 73.5), "ep": (80.4, 70.3),
        "aim": (88.9, 83.0), "pdiscoformer@4": (83.2, 75.5), "early-found": (84.5, 77.1),
        "erm --objective group-dro": (73.6, 66.0),
        "ifam --hardness soft@4": (88.0, 86.3), "ifam --no-shaping@4": (85.4, 79.1),
        "ifam --no-stage1-class@4": (86.9, 82.3), "ifam --freeze-stage2@4": (85.0, 85.0),
        "pdiscoformer + LOO@4": (85.2, 76.8), "pdiscoformer + LOO + patches@4": (85.4, 76.8),
        "ifam + patches q 0.97@8": (84.7, 79.1), "ifam + patches q 0.99@8": (84.7, 80.1),
        "ifam + LOO@8": (84.7, 81.7), "ifam + LOO + patches@8": (84.8, 83.0)}),
    "cub": (("accuracy",), {
        "early-truth": (91.4,), "late-truth": (90.7,), "frozen": (89.2,), "erm": (91.6,), "pdiscoformer@4": (89.1,),
        "pdiscoformer@8": (88.8,), "pdiscoformer@16": (88.7,),
        "ifam --hardness soft@4": (90.6,), "ifam --no-shaping@4": (90.3,), "ifam --no-stage1-class@4": (88.9,),
        "ifam --freeze-stage2@4": (89.1,)}),
    "waterbird200": (("accuracy", "foreground IoU"), {
        "early-truth": (88.8,), "late-truth": (74.8,), "frozen": (76.6,), "erm": (68.4,), "pdiscoformer@4": (76.0,),
        "pdiscoformer@8": (76.8,), "pdiscoformer@16": (75.8,),
        "ifam --hardness soft@4": (85.7,), "ifam --no-shaping@4": (80.2,), "ifam --no-stage1-class@4": (85.0,),
        "ifam --freeze-stage2@4": (83.7,),
        "ifam + patches q 0.97@4": (86.8, 65.2), "ifam + patches q 0.99@4": (86.6, 65.9),
        "ifam + patches q 0.97@8": (86.7, 71.4), "ifam + patches q 0.99@8": (86.9, 72.4),
        "ifam + patches q 0.97@16": (87.3, 72.9), "ifam + patches q 0.99@16": (86.9, 73.1)}),
    "siim": (("AUROC", "worst group AUROC"), {
        "frozen": (90.6, 40.6), "erm": (92.6, 54.3), "pdiscoformer@8": (92.6, 48.1), "bbox-erm": (92.4, 72.0),
        "seg-erm": (93.3, 82.0), "erm --objective jtt": (92.6, 55.9), "erm --objective george": (92.0, 63.4),
        "pdiscoformer + LOO@8": (92.6, 48.1), "pdiscoformer + LOO + patches@8": (92.6, 48.2),
        "ifam + patches q 0.97@8": (92.0, 66.0), "ifam + patches q 0.99@8": (92.2, 66.4),
        "ifam + LOO@8": (90.6, 67.3), "ifam + LOO + patches@8": (91.1, 69.0)}),
    "imagenet": (("accuracy",), {"frozen": (84.6,), "pdiscoformer@1": (83.3,), "erm + LLE": (76.3,)}),
    "imagenet9": (("accuracy", "mixed-same", "mixed-rand", "BG-GAP"), {
        "frozen": (98.1, 93.1, 87.1, 6.0), "pdiscoformer@1": (98.4, 93.9, 88.6, 5.3),
        "erm --masktune": (95.6, 91.1, 78.6, 12.5), "erm + LLE": (95.5, 88.3, 83.4, 4.9)})}
NETWORKS = {             # how a row begins: its network in the paper, or in what the paper cites, where it is no ViT-B
    **dict.fromkeys(("erm --masktune", "erm --objective ", "erm + LLE"), "ResNet-50"),
    **dict.fromkeys(("bbox-erm", "seg-erm"), "segmentation network")}
METRICS = {"aa": "accuracy", "worst_group": "worst group", "worst_group_rare": "worst rare group", "auroc": "AUROC",
           "robust": "worst group AUROC", "foreground_iou": "foreground IoU", "mixed_same": "mixed-same",
           "mixed_rand": "mixed-rand", "bg_gap": "BG-GAP"}
PERCENT = ("AUROC", "worst group AUROC", "BG-GAP")       # columns that our reports give in percent too
FOOTNOTE = ("paper: the number in the paper's tables, where it has one: **real data, full size** (ViT-B/14 where no "
            "other network is named), with the number of parts. Beside a miniature it says which way to expect a "
            "difference, not how large. Its FOUND masks are those of FOUND's trained head; its given masks are pooled "
            "as published: early ones by the class token, late ones by the mean over all patches. Its MetaShift test "
            "set is our test_and_val. What it takes from other papers (GroupDRO, MaskTune) may be of other groups; "
            "MaskTune's Waterbirds has corrected labels. Which components its PCA probe takes is our reading.")


def from_paper(benchmark, row, k):
    """-> {column: (number in our units, parts or None)} for a row of a benchmark; {} where the paper has none.

    A method with parts is looked up at the run's K. A miniature ("-mini") has a K of its own: where the paper does not
    have it, its smallest.
    """
    name = data.benchmark_of(benchmark)
    columns, rows = PAPER.get(name, ((), {}))
    for parts, found in data.BENCHMARKS[name].paper.items():
        titled = {METRICS[metric]: number for metric, number in found.items()}
        rows = {**rows, f"ifam@{parts}": tuple(titled[title] for title in columns)}
    row = re.sub(r" --(k|batch|micro|amp|val-share|select|upweight|hide-with|masktune-lr|dro-\w+) \S+", "", row)
    row = row.removesuffix(ON_TEST)                      # the paper's vary
    row = re.sub(r"(--objective (jtt|george)) --groups \S+", r"\1", row)
    if row.split()[0] in GIVEN:                          # the paper's are all as published, the ladder is comparable
        row = re.sub(r" --(pooling|mask-rule|finder) \S+", "", row)
    if not any(name.startswith(row + "@") for name in rows):
        row = re.sub(r" q \S+$", "", row)                # Table 4 has one quantile, which our copy does not name
    known = {int(name.split("@")[1]): numbers for name, numbers in rows.items() if name.startswith(row + "@")}
    parts = k if k in known else min(known) if known and benchmark.endswith("-mini") else None
    numbers = rows.get(row) or known.get(parts, ())
    return {c: (n if c in PERCENT else n / 100, parts) for c, n in zip(columns, numbers)}


# ---------------------------------------------------------------- runs -> rows
def row_name(config):
    """What a run is, from its config.json: its method, and as flags the settings that are not its defaults."""
    usual = usual_recipe(config["mini"])
    recipe = config.get("recipe", usual)                 # earlier runs do not say
    objective, file = config.get("objective", RunConfig.objective), config.get("groups")
    given = {key: config[key] for key in ("data", "mini", "method")} | {"recipe": recipe}
    given |= {"objective": objective} if objective != RunConfig.objective else {}        # not every method has one
    default = RunConfig(**{**preset(given), **given, "seed": config["seed"]})
    changed = differences({**asdict(default), **config}, default)
    words = [config["method"], *[f"--recipe {recipe}"] * (recipe != usual),
             *[f"--objective {objective}"] * (objective != RunConfig.objective),
             *[f"--groups {Path(file or '').name}"] * bool(file)]
    for name, (value, _) in changed.items():
        typed = flag(name)
        if name == "masktune":                           # the folder is another for each seed
            value = True
        words.append(typed if value is True else f"--no-{typed[2:]}" if value is False else f"{typed} {value}")
    return " ".join(words)


def crossed(name, split):
    """Do the groups of a benchmark's split tell more than its classes? Those of a folder of one's own may."""
    benchmark = data.BENCHMARKS[name]
    counts = benchmark.counts.get(split, ((),))[0]
    return not benchmark.classes or sum(n > 0 for n in counts) > benchmark.classes


MADE = r"groups-(errors|clusters|background)\.csv"        # what groups.py calls its files


def source_of_groups(config):
    """Where the groups of an objective come from, for runs whose log does not say: those from before it did."""
    groups = config.get("groups") or ""
    if config.get("objective", RunConfig.objective) in MAKES or re.fullmatch(MADE, Path(groups).name):
        return "a first model"
    return "groups" if groups or crossed(config["data"], "train") else "classes"


def supervision(config, report, objective=None):
    """What a row was given beside images and classes, from the config.json of its run and its report -> dict.

    {"groups", "masks", "images": the splits whose groups, masks or labelled images it was given, "passes": trainings
    over the data, "more_epochs": those after the last of them (masktune), "head": was the last layer fitted once more}.
    Groups of --groups count as groups of training, but for those that a first model made. objective: what the log says
    of the objective.
    """
    name, weighs = config["data"], config.get("objective", RunConfig.objective) != "erm"
    source = weighs and ((objective or {}).get("source") or source_of_groups(config))
    decision = report.get("intervention", {}).get("decision")
    head = report.get("retrain", {})
    selected = config.get("select") == "worst_group" or decision and chosen_on(decision) == "val" or head.get("groups")
    told = config["method"].endswith("-truth") or config.get("trim") == "truth"
    by = SEGMENT.get(config["method"], config.get("supervise"))
    taught = by == "masks" or head.get("mask") == "true" or config.get("swap") and config.get("swap_mask") == "true"
    masks = ["training", "test"] if told else ["training"] if taught else ["training, as boxes"] * (by == "boxes")
    return {"groups": ["training"] * (source == "groups") + ["validation"] * bool(selected and crossed(name, "val")),
            "masks": masks, "images": ["validation"] * ("val" in head.get("fitted_on", ())),
            "passes": 1 + (source == "a first model"), "more_epochs": int(bool(config.get("masktune"))),
            "head": bool(head)}


def supervision_text(found):
    """The cell of it: "groups: training, validation; masks: training; 2 passes"; "none" for classes and one pass.

    "1 pass + head" where the last layer was fitted once more.
    """
    given = [f"{what}: {', '.join(found[what])}" for what in ("groups", "masks", "images") if found[what]]
    passes = f"{found['passes']} pass" + "es" * (found["passes"] > 1) + " + 1 epoch" * found["more_epochs"] + \
        " + head" * found["head"]
    return "; ".join(given + [passes] * (passes != "1 pass")) or "none"


ON_TEST = " (chosen on test)"


def correction(report):
    """What an intervention took out, as the end of a row's name.

    What was named by hand is named here; what the rule took may be another part or quantile for each seed.
    """
    if not (found := report.get("intervention")):
        return ""
    decision, q = found["decision"], found["q"]
    hand = [f"part {part}" for part in decision["parts_by_hand"]]
    patches = "" if q is None else " + patches" + f" q {q}" * (decision["q_by"] == "hand")
    taken = " + without " * bool(hand) + ", ".join(hand) + " + LOO" * bool(decision["parts_by_rule"]) + patches
    return (taken or " + nothing found") + ON_TEST * (chosen_on(decision) == "test")


def new_head(report):
    """The last layer that evaluate.py --retrain gave the model, as the end of a row's name; "" for its own."""
    return f" + {TITLES[report['retrain']['how']]}" if "retrain" in report else ""


def read_run(folder):
    """A run -> [(path of a report, row name, seed, K, report)], empty if it has none. UsageError for a damaged file.

    A report that is not of the run's present best.pt is left out, by name.
    """
    if not (folder / "config.json").is_file():
        return []
    config, found, log = read_config(folder / "config.json"), [], folder / "log.jsonl"
    lines = read_log(log) if log.is_file() else []
    objective = next((line["objective"] for line in lines if "objective" in line), None)
    for path in sorted(folder.glob("report*.json"), key=lambda path: path.stem):
        report = read_json(path, "a report of evaluate.py")
        try:
            if absent := {"data", "split", "images", "leakage"} - report.keys():
                raise KeyError(f"no {min(absent)}")
            for title, value in COLUMNS.items():
                if (x := value(report)) is not None and not math.isfinite(x):
                    raise ValueError(f"{title} is {x}")
            report["supervision"] = supervision(config, report, objective)
            row = row_name(config) + correction(report) + new_head(report), config["seed"], config["k"], report
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is not as evaluate.py writes it ({type(error).__name__}: {error}); write it "
                             "again, or leave the folder out") from None
        if of_best(report, folder) is not False:
            found.append((path, *row))
        else:
            print(f"left out, for it is not of the present best.pt: {path}", file=sys.stderr)
    return found


def collect(folders):
    """Folders of runs -> {(data, split, images): {row name: {seed: (report's path, K, report)}}}, as they are given."""
    tables, found = {}, {folder: read_run(folder) for folder in folders}
    empty = [str(folder) for folder, reports in found.items() if not reports]
    if len(empty) == len(found):
        raise UsageError(f"{empty[0]} has no config.json of train.py or no report.json: run evaluate.py --ckpt "
                         f"{empty[0]}/best.pt first, or name another run")
    if empty:
        print(f"left out, without config.json or report.json: {', '.join(empty)}", file=sys.stderr)
    for reports in found.values():
        for path, name, seed, k, report in reports:
            table = tables.setdefault((report["data"], report["split"], report["images"]), {})
            if twin := table.setdefault(name, {}).get(seed):
                raise UsageError(f"{twin[0]} and {path} are of the same settings and seed: move one of them away")
            table[name][seed] = path, k, report
    return tables


def interval(values):
    """Mean of numbers and half the width of its 95 % interval; the latter is None for one number or more than 20."""
    n, mean = len(values), sum(values) / len(values)
    if not 2 <= n <= len(T) + 1:
        return mean, None
    return mean, T[n - 2] * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


def summarise(data, name, runs):
    """One row: runs {seed: (report's path, K, report)} -> dict, as the JSON has it. Numbers are not rounded."""
    numbers = {}
    for title, value in COLUMNS.items():
        values = [x for _, _, report in runs.values() if (x := value(report)) is not None]
        if values:
            mean, half = interval(values)
            numbers[title] = {"mean": mean, "half_interval": half, "values": values}
    worst = numbers.get("worst group")
    paper = from_paper(data, name, next(iter(runs.values()))[1])
    network = next((network for begin, network in NETWORKS.items() if name.startswith(begin)), None)
    return {"row": name, "supervision": next(iter(runs.values()))[2]["supervision"], "seeds": list(runs),
            "reports": [str(path) for path, _, _ in runs.values()],
            "leakage_images": sorted({r["leakage"]["images"] for _, _, r in runs.values() if r["leakage"]}),
            "numbers": numbers, "least_worst_group": min(worst["values"]) if worst else None,
            "paper": {title: {"value": value, "parts": parts, "network": network}
                      for title, (value, parts) in paper.items()}}


# ---------------------------------------------------------------- the cells, once for every kind of text
def layout(rows):
    """-> (titles, rows of cells as text, notes): columns that some row has, the paper's beside ours where it has one.

    The first columns are the row's name, its number of seeds, and its supervision. A cell without a number is DASH.
    """
    titles = [t for t in COLUMNS if any(t in r["numbers"] for r in rows)]
    papers = [t for t in titles if any(t in r["paper"] for r in rows)]
    least = lambda r: DASH if r["least_worst_group"] is None else f"{r['least_worst_group']:.3f}"
    some_least = any(least(r) != DASH for r in rows)
    both = lambda t, mine, paper: (mine, paper)[:1 + (t in papers)]
    head = ["", "n", "supervision", *(h for t in titles for h in both(t, t, "paper")),
            *["least worst group"] * some_least]
    body = []
    for r in rows:
        n = len(r["seeds"])
        cells = (c for t in titles for c in both(t, ours(r["numbers"].get(t), n), theirs(r["paper"].get(t))))
        body.append([r["row"], str(n), supervision_text(r["supervision"]), *cells, *[least(r)] * some_least])
    notes = ["supervision: what a row was given beside images and their classes, and trainings over the data if more "
             "than one."]
    if some := sorted({n for r in rows for n in r["leakage_images"]}):
        count = f"{some[0]}" + f" to {some[-1]}, by run: of more it is larger" * (len(some) > 1)
        notes.append(f"repaint, logits: the largest change of an image, of {count}.")
    if "late" in titles:
        notes.append("late, early: worst group (accuracy where there are none) of a linear head on frozen weights, "
                     "the true mask acting after and before attention.")
    if "between parts" in titles:
        notes.append("between parts: accuracy at reading an attribute of another part from a part, after attention "
                     "over all kept patches less that after attention over the part alone.")
    return head, body, [*notes, *[FOOTNOTE] * bool(papers)]


def caption(data, split, images):
    return f"{data}, {split}, {images:,} images"


def markdown(data, split, images, rows):
    """A table as text."""
    head, body, notes = layout(rows)
    lines = [f"| {' | '.join(line)} |" for line in (head, *([f"`{name}`", *cells] for name, *cells in body))]
    lines.insert(1, f"|{'|'.join(['---'] * len(head))}|")
    return "\n".join([f"**{caption(data, split, images)}**", "", *lines, *(x for note in notes for x in ("", note))])


TEX = "% Tables of measure.tables; they need \\usepackage{booktabs}\n"
ESCAPED = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
           ">": r"\textgreater{}", "±": r"$\pm$", "–": "--", **{c: "\\" + c for c in "&%$#_{}"}}


def escaped(text, typed=False):
    """Text as LaTeX prints it; typed: flags, whose two hyphens must not become one dash."""
    text = "".join(ESCAPED.get(c, c) for c in text)
    return re.sub("-(?=-)", "-{}", text) if typed else re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", text)


def latex(data, split, images, rows):
    """The same table for LaTeX, with the rules of the package booktabs; the cells are those of the Markdown."""
    head, body, notes = layout(rows)
    lines = [[escaped(cell) for cell in head]] + [[rf"\texttt{{{escaped(name, typed=True)}}}", *map(escaped, cells)]
                                                  for name, *cells in body]
    top, *below = (" & ".join(line) + r" \\" for line in lines)
    return "\n".join([r"\begin{table}", r"\centering", rf"\caption{{{escaped(caption(data, split, images))}}}",
                      rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule", top, r"\midrule", *below,
                      r"\bottomrule", r"\end{tabular}", *(rf"\par\smallskip\footnotesize {escaped(n)}" for n in notes),
                      r"\end{table}"])


FIRST = ("data", "split", "images", "method")            # columns of every csv, before those of its tables


def flat(tables):
    """All tables as the rows of one csv: cells of the Markdown, empty where there is no number or no such column."""
    rows, columns = [], dict.fromkeys(FIRST, "")
    for table in tables:
        head, body, _ = layout(table["rows"])
        head = ["method", *(f"{before}, paper" if title == "paper" else title for before, title in zip(head, head[1:]))]
        columns |= dict.fromkeys(head, "")
        rows += [{**{x: table[x] for x in FIRST[:3]}, **dict(zip(head, cells))} for cells in body]
    return [{**columns, **{title: "" if cell == DASH else cell for title, cell in row.items()}} for row in rows]


def ours(number, seeds):
    """Few numbers from least to best, else their mean and half interval; where some seeds have none, how many do."""
    if number is None:
        return DASH
    half, values = number["half_interval"], sorted(number["values"])
    short = lambda x: "0" if x == 0 else f"{x:.2f}" if abs(x) >= 0.01 else f"{x:.1g}"      # 0 is said of 0 alone
    text = f"{number['mean']:.3f}" + (f" ± {half:.3f}" if half is not None else "")
    if 1 < len(values) <= FEW:
        text = " / ".join(map(short, values))
    return text + f" (of {len(values)})" * (len(values) < seeds)


def theirs(number):
    if number is None:
        return DASH
    note = number["network"] or number["parts"] and f"K={number['parts']}"
    return f"{number['value']:.3f}" + f" ({note})" * bool(note)


def write_tables(folders, out="", force=False):
    """Print the tables of these runs; with out, also write <out>.md, <out>.tex, <out>.csv and <out>.json."""
    begins = lambda text: lambda path: path.read_text().startswith(text)
    files = {".md": begins("**"), ".tex": begins(TEX), ".csv": begins(",".join(FIRST)),
             ".json": lambda path: json.loads(path.read_text()).keys() == {"paper", "tables"}}
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        for ending, is_ours in files.items():
            may_write(f"{out}{ending}", is_ours, force)
    tables = [{"data": data, "split": split, "images": images,
               "rows": [summarise(data, name, runs) for name, runs in rows.items()]}
              for (data, split, images), rows in collect(folders).items()]
    text = "\n\n".join(markdown(**table) for table in tables) + "\n"
    print(text, end="")
    if out:
        tex = TEX + "\n".join(latex(**table) for table in tables) + "\n"
        for ending, content in ((".md", text), (".tex", tex)):
            write_whole(f"{out}{ending}", lambda temporary: temporary.write_text(content, encoding="utf-8"))
        write_csv(f"{out}.csv", flat(tables))
        write_json(f"{out}.json", {"paper": FOOTNOTE, "tables": tables})


@dataclass
class Config:
    runs: list[Path] = opt(MISSING, "folders of runs, with config.json and report.json", positional=True)
    out: str = opt("", "write <out>.md, <out>.tex, <out>.csv and <out>.json as well")
    force: bool = opt(False, "replace files that this script did not write")


def main(argv=None):
    given = parse(Config, __doc__, argv)
    folders = [run for run in given.runs if not run.is_file()]
    if not folders:
        raise UsageError(f"{given.runs[0]} is not a folder: name folders of runs")
    write_tables(folders, given.out, given.force)


if __name__ == "__main__":
    run_script(main)
