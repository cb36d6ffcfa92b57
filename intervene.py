"""intervene.py: correct a trained model at test time: remove a part, or patches that are unlike the part they went to.

    python intervene.py --ckpt runs/waterbirds-mini/best.pt                     # look: a sheet and an effect per part
    python intervene.py --ckpt runs/waterbirds-mini/best.pt --drop 2            # remove part 2
    python intervene.py --ckpt runs/waterbirds-mini/best.pt --loo               # let the rule decide which parts
    python intervene.py --ckpt runs/waterbirds-mini/best.pt --loo --q 0.9 0.95 0.99
    python evaluate.py --ckpt runs/waterbirds-mini/best.pt --intervention runs/waterbirds-mini/intervention.json

Parts (--drop, --loo): patches of a removed part become background. Patches (--q): in each part, those that are more
unlike it than a share q of the training patches become background. How unlike: the distance to the prototype, as in the
paper; --score margin or cosine are others. The weights stay as they are (paper section 3.4). --drop and a single --q
are done as told; --loo and several --q are decided by this rule, on --split:

    a removal is accepted if the worst group rises, and the average stays within --tolerance of the untouched model's.

Where a benchmark has no groups its classes are the groups; of many, the worst is the mean of the worst tenth. SIIM-ACR
is decided by AUROC: of all images, and of those whose tube misleads (without tube labels, of all). --loo takes the
accepted part with the best worst group (then average, then number) and looks again among the rest. An image that loses
all its patches is classified from class token and registers alone, and counted as empty.

Writes one contact sheet per part, with the patches that beat the background by most, and, if anything was asked for,
intervention.json, which holds for this checkpoint only, and a picture of what --q removed.

Floor: commands. Read ifam.refuse (what an intervention does to a model) first. Letters: ifam.py.
"""
import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import data
from benchmarks.files import is_our_picture
from ifam import SCORES, limits_of, unlikeness
from interventions import THRESHOLDS, describe_intervention
from measure import figures
from measure.metrics import auroc
from predict import OnCheckpoint, open_split
from runs import hash_of, load_model, pick_device, refuse_told
from settings import UsageError, may_write, opt, parse, progress, run_script, write_json


@dataclass
class Config(OnCheckpoint):
    drop: list[int] = opt((), "numbers of the parts to remove", at_least=0, group="intervention")
    loo: bool = opt(False, "leave one out: remove the parts that the rule accepts, beside those of --drop")
    q: list[float] = opt((), "remove patches beyond this quantile of the distances in the training set; of several, "
                             "the rule chooses one or none", above=0, below=1)
    score: str = opt("distance", "what --q is a quantile of: the distance to the prototype, as in the paper, the "
                                 "margin over the background, or the cosine with the prototype", choices=SCORES)
    tolerance: float = opt(0.01, "what a removal that the rule accepts may cost the average: 0.01 is one point",
                           at_least=0)
    split: str = opt("val", "images that effects are measured on and the rule decides by; test only if you mean it",
                     choices=("val", "test"))
    out: str = opt("", "file to write; pictures lie beside it (default intervention.json beside the checkpoint)")
    force: bool = opt(False, "replace files that this script did not write")

    def __post_init__(self):
        super().__post_init__()
        self.drop, self.q = (tuple(sorted(set(given))) for given in (self.drop, self.q))
        self.out = self.out or str(Path(self.ckpt).parent / "intervention.json")


RULE = "the worst group rises, and the average stays within the tolerance of the untouched model's"


# ---------------------------------------------------------------- thresholds
class Quantiles:
    """Streaming quantiles of non-negative numbers, for each of several parts: memory is fixed and order irrelevant.

    The bits of a positive float32, read as a whole number, are in the order of the floats. This is a histogram over
    the leading ones, exponent and BITS of the mantissa: a bin is 2**-BITS of its value wide (0.024 %), whatever the
    scale. 8 MiB a part, for CUB as for ImageNet's 300 million patches.
    """
    BITS = 12

    def __init__(self, parts):
        self.counts = torch.zeros(parts, 1 << 8 + self.BITS, dtype=torch.int64)

    def add(self, part, values):
        """part (n,) whole numbers, values (n,) >= 0."""
        tiny = torch.finfo(torch.float32).tiny           # distances come from a difference: -0.0 is possible, and less
        bits = values.float().clamp_min(tiny).view(torch.int32) >> (23 - self.BITS)
        self.counts.view(-1).index_add_(0, part * self.counts.shape[1] + bits, torch.ones_like(part))

    def at(self, q):
        """-> (parts,): the least bin edge that a share q of a part's numbers do not exceed, inf for a part without any.

        It is never below the exact quantile, and above it by 2**-BITS of it at most.
        """
        counts = self.counts.cumsum(1)
        rank = (q * counts[:, -1:].double() - 1e-6).ceil().clamp_min(1).long()   # 0.07 * 100 is 7.000000000000001
        bin = torch.searchsorted(counts, rank)[:, 0]
        edge = ((bin + 1 << 23 - self.BITS) - 1).int().view(torch.float32)
        return torch.where(counts[:, -1] > 0, edge, math.inf)

    def above(self, q):
        """-> (parts,): the largest bin edge that a share q of a part's numbers reach, -inf for a part without any.

        It is never above the value that the exact share reaches, and below it by 2**-BITS of it at most.
        """
        counts = self.counts.flip(1).cumsum(1)
        rank = (q * counts[:, -1:].double() - 1e-6).ceil().clamp_min(1).long()
        bin = self.counts.shape[1] - 1 - torch.searchsorted(counts, rank)[:, 0]
        edge = (bin << 23 - self.BITS).int().view(torch.float32)
        return torch.where(counts[:, -1] > 0, edge, -math.inf)

    def seen(self):
        """-> how many numbers of each part came in (parts,)."""
        return self.counts.sum(1)


@torch.no_grad()
def calibrate(model, train, device="cpu", batch=32, workers=0, score="distance"):
    """How unlike their part training patches are, in evaluation view -> Quantiles: of margins, or of the unlikeness."""
    selector, found = model.selector, Quantiles(model.selector.k)
    for images in loader(train, batch, workers, "calibrate"):
        features = selector.features(images["image"].to(device))
        part_logits = selector.select(features).part_logits
        unlike, part = unlikeness(score, part_logits, features, selector.prototypes).cpu(), part_logits.argmax(1).cpu()
        some = part < selector.k
        found.add(part[some], -unlike[some] if score == "margin" else unlike[some])
    return found


def thresholds_at(found, q, score):
    """Of what `calibrate` found: how unlike a patch of each part may be, so that a share q of them stays -> (K,)."""
    return -found.above(q) if score == "margin" else found.at(q)


# ---------------------------------------------------------------- the effect of a removal
def loader(samples, batch, workers, title, masks=False):
    """Batches of a split without what is not needed, which spares its decoding."""
    samples = copy.copy(samples)
    samples.points = samples.boxes = None
    samples.masks = samples.masks if masks else None
    return progress(torch.utils.data.DataLoader(samples, batch, num_workers=workers), title)


class Census(NamedTuple):
    """Where the untouched model puts its parts, for the n images of a split."""
    margin: torch.Tensor         # (n, K)  the largest margin over the background of a patch, -inf where it has none
    where: torch.Tensor          # (n, K)  that patch
    count: torch.Tensor          # (n, K)  patches of the part
    area: torch.Tensor | None    # (n, K)  how many of them the object would fill; None without masks
    best: torch.Tensor | None    # (n, K)  the share of object in the patch with the largest margin


def census(part_logits, objects=None):
    """Part logits (B, K+1, N), objects (B, N), the share of object in each patch, or None -> Census.

    The margin decides whether a patch is kept; the distance alone does not.
    """
    nearest, part = part_logits.max(1, keepdim=True)
    mine = part == torch.arange(part_logits.shape[1] - 1, device=part.device)[:, None]   # (B, K, N)
    margin, where = torch.where(mine, nearest - part_logits[:, -1:], -math.inf).max(2)
    if objects is None:
        return Census(margin, where, mine.sum(2), None, None)
    return Census(margin, where, mine.sum(2), (mine * objects[:, None]).sum(2), objects.gather(1, where))


@torch.no_grad()
def predict_each(model, samples, options, device="cpu", batch=32, workers=0):
    """Predictions under several interventions, stage 1's backbone run once -> ([(logits (n, C), kept (n,))], Census).

    options: limits (K,), each as Selector.limits has them, or None. kept: patches left in each image.
    """
    selector, found, where = model.selector, [[] for _ in options], []
    try:
        for part in loader(samples, batch, workers, f"{len(options)} interventions", masks=True):
            images = part["image"].to(device)
            selector.limits = None
            features = selector.features(images)
            objects = None
            if "mask" in part:
                masks = selector.shrink(part["mask"][:, None].float())
                objects = F.avg_pool2d(masks, selector.backbone.patch).flatten(1)
            where.append(census(selector.select(features).part_logits.cpu(), objects))
            for rows, limits in zip(found, options):
                selector.limits = None if limits is None else limits.to(device)
                first = selector.select(features)
                logits = model.second_stage(images, first).logits
                rows.append((logits.float().cpu(), model.mask(first).sum(1).cpu()))
    finally:
        selector.limits = None
    gather = lambda rows: [None if column[0] is None else torch.cat(column) for column in zip(*rows)]
    return [gather(rows) for rows in found], Census(*gather(where))


class Trials:
    """A model on the split that decides. rows: what was measured, by (parts removed, q), first the untouched model.

    average, worst: the two numbers of a row that RULE speaks of.
    """
    average, worst = "aa", "worst_group"

    def __init__(self, model, samples, **loading):
        self.model, self.samples, self.loading = model, samples, loading
        self.patches = math.prod(model.grid)
        if "auroc" in data.BENCHMARKS[samples.name].metrics:
            self.average, self.worst = "auroc", "auroc_rare"
        self.thresholds = {None: None}                   # {q: (K,) how unlike a patch of each part may be}
        self.rows, self.census, self.calibration = {}, None, None

    def measure(self, *options):
        """Rows of these (parts removed, q); those not yet known are measured, in one pass."""
        new = [option for option in dict.fromkeys(options) if option not in self.rows]
        if new:
            limits = [limits_of(self.model.selector.k, drop, self.thresholds[q]) for drop, q in new]
            found, self.census = predict_each(self.model, self.samples, limits, **self.loading)
            for option, result in zip(new, found):       # one by one: effects look up the untouched model's row
                self.rows[option] = self.row(*option, *result)
        return [self.rows[option] for option in options]

    def calibrate(self, train, quantiles, name):
        """Learn the thresholds of these quantiles from the training split, `name` for the file."""
        train.check()
        score = self.model.selector.score
        found = calibrate(self.model, train, **self.loading, score=score)
        self.thresholds |= {q: thresholds_at(found, q, score) for q in quantiles}
        sign = -1 if score == "margin" else 1            # a file has margins, not what they are the negative of
        listed = {str(q): [None if t == math.inf else sign * t for t in self.thresholds[q].tolist()] for q in quantiles}
        self.calibration = {"data": name, "split": train.split, "images": len(train), "view": "evaluation",
                            "patches": found.seen().tolist(), THRESHOLDS[score]: listed}

    def row(self, drop, q, logits, kept):
        """The numbers of one intervention, and its effect: their difference from the untouched model's."""
        some = self.samples
        right = (some.answers(logits) == some.labels).double()
        shares = lambda kind, names: {name: right[kind == i].mean().item() for i, name in enumerate(names)
                                      if (kind == i).any()}
        row = {"drop": list(drop), "q": q, "aa": right.mean().item(), "groups": shares(some.groups, some.group_names),
               "kept_share": kept.mean().item() / self.patches, "empty": int((kept == 0).sum())}
        lowest = sorted(row["groups"], key=row["groups"].get)[:max(1, len(row["groups"]) // 10)]
        row["worst_group"] = sum(row["groups"][name] for name in lowest) / len(lowest)
        row["worst_group_name"] = lowest[0] + f" and {len(lowest) - 1} more" * (len(lowest) > 1)
        if self.average == "auroc":
            row |= self.aurocs(logits)
        if some.places:                                  # else the classes are the groups
            row["classes"] = shares(some.labels, some.classes)
        base = self.rows.get(UNTOUCHED, row)
        row["effect"] = {key: row[key] - base[key] for key in EFFECTS if key in row}
        row["effect"] |= {kind: {name: share - base[kind][name] for name, share in row[kind].items()}
                          for kind in ("groups", "classes") if kind in row}
        return row

    def aurocs(self, logits):
        """-> AUROC, 0 to 1, of all images, and of those in the rare groups (of all, where no group is known)."""
        scores, labels = logits.double().softmax(1)[:, 1], self.samples.labels
        rare = torch.tensor(data.BENCHMARKS[self.samples.name].rare)
        hard = torch.isin(self.samples.groups, rare) if self.samples.places else torch.ones_like(labels, dtype=bool)
        return {"auroc": auroc(scores, labels), "auroc_rare": auroc(scores[hard], labels[hard])}

    def accepts(self, new, old, tolerance):
        """RULE, as the one place that decides. new, old: rows."""
        least = self.rows[UNTOUCHED][self.average] - tolerance - 1e-9
        return new[self.worst] > old[self.worst] and new[self.average] >= least

    def best(self, old, options, tolerance):
        """The best option that the rule accepts over the option `old`, or `old` if it accepts none."""
        rows = dict(zip([old, *options], self.measure(old, *options)))
        good = [option for option in options if self.accepts(rows[option], rows[old], tolerance)]
        return max(good, key=lambda option: (rows[option][self.worst], rows[option][self.average]), default=old)


UNTOUCHED = ((), None)
EFFECTS = ("aa", "worst_group", "auroc", "auroc_rare")


def leave_one_out(trials, drop, tolerance):
    """Remove the best part that the rule accepts, and again among the rest. -> parts removed, `drop` among them."""
    while True:
        rest = [p for p in range(trials.model.selector.k) if p not in drop]
        options = [(tuple(sorted((*drop, p))), None) for p in rest if len(rest) > 1]     # one part always stays
        chosen, _ = trials.best((drop, None), options, tolerance)
        if chosen == drop:
            return drop
        drop = chosen


# ---------------------------------------------------------------- what a person reads
def one_line(name):
    """The name of a class or group, often that of a folder, without line breaks or what a terminal cannot show."""
    return " ".join("".join(c if c.isprintable() else " " for c in name).split())


def most_changed(row):
    """The group or class that loses most by an intervention and the one that gains most, as text; "-" for none."""
    changes = {**row["effect"].get("classes", {}), **row["effect"]["groups"]}
    low, high = min(changes, key=changes.get), max(changes, key=changes.get)
    return (f"{one_line(low)} {changes[low]:+.3f}" if changes[low] < 0 else "-",
            f"{one_line(high)} {changes[high]:+.3f}" if changes[high] > 0 else "-")


def table(trials, chosen):
    """The rows as text: each intervention, what it does on average, to the worst group and to the most changed ones."""
    names = {"aa": ("average", "worst group"), "auroc": ("AUROC", "of rare groups")}[trials.average]
    cells = [("", *names, "worst group" * (trials.average == "auroc"), "loses most", "gains most", "kept", "empty")]
    for (drop, q), row in trials.rows.items():
        title = " and ".join(["without part " + ", ".join(map(str, drop))] * bool(drop) + [f"q {q}"] * (q is not None))
        cells.append(((title or "untouched") + " *" * ((drop, q) == chosen), f"{row[trials.average]:.3f}",
                      f"{row[trials.worst]:.3f}", one_line(row["worst_group_name"]), *most_changed(row),
                      f"{row['kept_share']:.1%}", str(row["empty"])))
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  " + "  ".join(map("{:{}{}}".format, row, "<>><<<>>", widths)).rstrip() for row in cells]
    empty = [p for p, n in enumerate(trials.census.count.sum(0).tolist()) if not n] if trials.census else []
    return "\n".join(lines + [f"  part {p} is empty: no patch of any image goes to it" for p in empty])


def pictures(trials, out, name, drop, device):
    """A contact sheet per part: what it is, what its removal does; and what the quantiles remove beside it -> paths."""
    model, samples, before, paths = trials.model, trials.samples, trials.rows[UNTOUCHED], []
    kept = trials.census.count.sum().clamp_min(1)
    for part, count in enumerate(trials.census.count.T):
        effect = "the only part: it cannot be removed"
        if after := trials.rows.get(((part,), None)):
            average, worst = (f"{before[key]:.3f} → {after[key]:.3f}" for key in (trials.average, trials.worst))
            effect = "removed: average {}, worst group {}\nloses most: {}; gains most: {}".format(
                average, worst, *most_changed(after))
        title = (f"part {part}: {count.sum() / kept:.0%} of the foreground patches, in "
                 f"{(count > 0).double().mean():.0%} of {len(count)} images ({name} {samples.split})\n{effect}")
        paths.append(beside(out, f"part-{part}"))
        title = title.replace("$", r"\$")                # a name may have one, and two would be a formula
        figures.part_sheet(model, samples, part, trials.census, title, paths[-1], device)
    if trials.calibration:
        paths.append(beside(out, "patches"))
        by = {"distance": "", "margin": "\nof the margin", "cosine": "\nof the cosine"}[model.selector.score]
        steps = [(f"q {q}{by}", limits_of(model.selector.k, drop, limits))
                 for q, limits in trials.thresholds.items() if q]
        figures.removals(model, samples, limits_of(model.selector.k, drop), steps[::-1], paths[-1], device)
    return paths


# ---------------------------------------------------------------- the command
def check(cfg, model, method):
    """UsageError for an intervention that this model cannot have."""
    if model.selector is None:
        raise UsageError(f"{cfg.ckpt} is of the method {method}, which has no parts: there is nothing to remove; name "
                         "a checkpoint of ifam or pdiscoformer")
    refuse_told(model, cfg.ckpt, "there is nothing to correct; name another --ckpt")
    k = model.selector.k
    if cfg.drop and cfg.drop[-1] >= k:
        raise UsageError(f"--drop {cfg.drop[-1]}: this model has no such part; its parts are 0 to {k - 1}")
    if len(cfg.drop) == k:
        raise UsageError(f"--drop removes all {k} parts, and nothing would be left to see; leave at least one")
    if cfg.score != Config.score and not cfg.q:
        raise UsageError(f"--score {cfg.score} is what --q removes patches by: add --q, or leave it out")
    if cfg.tolerance != Config.tolerance and not cfg.loo and len(cfg.q) < 2:
        raise UsageError("--tolerance is the rule's, and nothing here is decided by it: add --loo or several --q, or "
                         "leave it out")
    out = Path(cfg.out)
    if out.suffix != ".json" or not out.parent.is_dir() or out.is_dir():
        raise UsageError(f"--out {out}: name a .json file in a folder that exists")
    if out.stem in (*data.SPLITS, *data.BENCHMARKS):
        raise UsageError(f"--out {out} would take the place of the report on {out.stem}; choose another name")
    may_write(out, is_intervention, cfg.force)
    for what in [*(f"part-{part}" for part in range(k)), *["patches"] * bool(cfg.q)]:
        may_write(beside(out, what), is_our_picture, cfg.force)


def beside(out, what):
    """The path of a picture: intervention.json -> intervention-part-3.png."""
    return out.with_name(f"{out.stem}-{what}.png")


def is_intervention(path):
    """Is a file one of intervene.py?"""
    return {"checkpoint", "decision", "rows"} <= json.loads(path.read_text()).keys()


def decide(trials, cfg):
    """Everything that is measured, and what comes out -> the option (parts removed, q)."""
    k = trials.model.selector.k
    trials.measure(UNTOUCHED, *[((p,), None) for p in range(k) if k > 1], (cfg.drop, None))
    drop = leave_one_out(trials, cfg.drop, cfg.tolerance) if cfg.loo else cfg.drop
    options = [(drop, q) for q in cfg.q]
    if len(options) == 1:
        trials.measure(*options)
        return options[0]
    return trials.best((drop, None), options, cfg.tolerance)


def record(cfg, trials, chosen, name):
    """What was decided, on what grounds and for which checkpoint -> the content of intervention.json."""
    drop, q = chosen
    decision = {"data": name, "split": trials.samples.split, "images": len(trials.samples),
                "tolerance": cfg.tolerance, "rule": RULE, "parts_by_hand": list(cfg.drop),
                "parts_by_rule": [p for p in drop if p not in cfg.drop],
                "q_by": None if q is None else "hand" if len(cfg.q) == 1 else "rule"}
    return {"checkpoint": {"path": str(cfg.ckpt), "sha256": hash_of(cfg.ckpt)}, "drop": list(drop), "q": q,
            "score": cfg.score,
            "thresholds": None if q is None else trials.calibration[THRESHOLDS[cfg.score]][str(q)],
            "calibration": trials.calibration, "decision": decision, "rows": list(trials.rows.values())}


def explain(cfg, content):
    """What was asked for and what came out, as lines of text."""
    seen, split = (content["calibration"] or {}).get("patches", ()), content["decision"]["split"]
    lines = [f"part {p} has no patch in the training set, so it gets no threshold" for p, n in enumerate(seen) if not n]
    if cfg.loo or len(cfg.q) > 1:
        on_test = "; it saw the test set, so test numbers are too good" * (split == "test")
        lines.append(f"rule, on {split}: {RULE} (tolerance {cfg.tolerance:g}){on_test}")
    return [*lines, f"* {describe_intervention(content)}"]


def main(argv=None):
    cfg = parse(Config, __doc__, argv)
    device = pick_device(cfg.device)
    model, state = load_model(cfg.ckpt, device, cfg.data)
    trained = state["config"]
    check(cfg, model, trained["method"])
    model.selector.score = cfg.score
    name, samples, train, _ = open_split(cfg, state, model)
    trials = Trials(model, samples, device=device, batch=cfg.batch, workers=cfg.workers)
    if cfg.q and train is None:
        raise UsageError(f"--q is calibrated on training images, and {name} has none; make the intervention on "
                         f"{trained['data']}, it can be evaluated on {name} too")
    if cfg.q:
        trials.calibrate(train, cfg.q, data.report_name(train, trained["mini"]))
    chosen = decide(trials, cfg)
    print(f"{cfg.ckpt}: {trained['method']}, {model.selector.k} parts; {name} {samples.split}, {len(samples)} images")
    print(table(trials, chosen))
    written, then = pictures(trials, Path(cfg.out), name, chosen[0], device), ""
    if cfg.drop or cfg.loo or cfg.q:
        content = record(cfg, trials, chosen, name)
        print("  " + "\n  ".join(explain(cfg, content)))
        write_json(Path(cfg.out), content)
        written.append(Path(cfg.out))
        where = f" --data {cfg.data}" * bool(cfg.data) + f" --root {cfg.root}" * bool(cfg.root)
        then = f"; apply with: python evaluate.py --ckpt {cfg.ckpt}{where} --intervention {cfg.out}"
    print(f"  wrote {written[0]}" + f" and {len(written) - 1} more beside it" * (len(written) > 1) + then)


if __name__ == "__main__":
    run_script(main)
