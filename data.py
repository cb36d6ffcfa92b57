"""data.py: the benchmarks, in one table, and the door to them: a name -> splits of samples.

    train = load("waterbirds", root="data", size=518)["train"]
    train[epoch, index]      # {"image": (3, S, S), "label": int, "group": int, "id": str}, the same at every call

    python data.py --root photos --sheet sheet.png       # look at pictures of your own before training
    python data.py --data waterbirds --mini              # or at a benchmark

The command says what is odd about the data, prints how often each class meets each place, and draws some of each group.
Every split of every benchmark is a Samples; a loader in benchmarks/ finds its files, labels, groups and annotations.

Floor: data. Read benchmarks/samples.py first (what a split is), then the benchmark that you need.
"""
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

import miniature
from benchmarks import folder
from benchmarks.cub import load_cub, load_waterbird200, load_waterbirds
from benchmarks.files import NotThere, check_sheet, is_miniature, say, too_deep, write_sheet
from benchmarks.imagenet import IN9_VARIANTS, load_imagenet, load_imagenet9
from benchmarks.metashift import load_metashift
from benchmarks.samples import crosstab, describe, stratified
from benchmarks.siim import load_siim
from benchmarks.transforms import AS_THEY_ARE, FINE_GRAINED, PHOTOGRAPHS, RADIOGRAPHS, Pipeline
from settings import UsageError, opt, parse, run_script


# ---------------------------------------------------------------- loaders
def load(name, root="data", size=None, seed=0, limit=0, splits=(), check=True, val_share=0.0, strict=False):
    """Read a benchmark -> {"train": Samples, "val": Samples, "test": Samples, ...}, those that it has.

    root: folder that holds the unpacked archives; size in pixels (default: the benchmark's); limit: only so many
    samples of each split; splits: only these (default: all); check: every image must be there, or the names of the
    splits in which it must; val_share: hold out this share of the training images, of each class alike, as validation;
    strict: the counts must be the published ones. Raises UsageError when something is not where it belongs or is not
    what the benchmark has.
    """
    benchmark, root = BENCHMARKS[name], Path(root)
    found = read(name, root, size or benchmark.size, seed)
    if benchmark.survey:
        lines = benchmark.survey(found, None if check is True else check or ())
        for line in [table(found)] * (check is True) + lines:
            say(line)
    for split, samples in found.items():
        judge(benchmark, split, samples, root, limit)
    if differs := "; ".join(f"{split}: {samples.differs}" for split, samples in found.items() if samples.differs):
        if strict:
            raise UsageError(f"{name} is not as published: {differs}; unpack {benchmark.source}, or leave out "
                             "--strict-data" if benchmark.classes else f"--strict-data: {differs}")
        if benchmark.classes:                            # of a folder of one's own, survey has said it
            say(f"{name} is not as published: {differs}")
    if val_share:
        if "val" in found or "train" not in found:
            raise UsageError(f"--val-share: {name} has {'its own validation' if 'val' in found else 'no training'} "
                             "split; leave it out")
        train, held = stratified(found["train"].labels, val_share)
        found |= {"train": found["train"].part("train", train), "val": found["train"].part("val", held)}
    if benchmark.survey and check is True:
        missing_splits(found)
    if "train" in splits and "train" not in found:
        raise UsageError(f"{name}: no training images under {root.resolve()}; expected {benchmark.layout}")
    found = {split: found[split].first(limit) for split in splits or found if split in found}
    for split, samples in found.items():
        if not benchmark.survey and (check is True or check and split in check):
            samples.check()
        say(describe(samples))
    return found


def missing_splits(found):
    """Say what follows where a folder of one's own has no validation or no test split."""
    if "train" not in found:
        return
    title, hold = next(iter(found.values())).title, "--val-share 0.1 holds out a tenth of the training images"
    if "test" not in found and "val" in found:
        say(f"{title}: no test split: evaluate.py measures on val, on which the best epoch is chosen too")
    elif "test" not in found:
        say(f"{title}: no val and no test split: nothing to measure on; {hold}")
    elif "val" not in found:
        say(f"{title}: no val split: best.pt is the last epoch; {hold}, to choose the best one")


ROWS = 40                                                # lines of a table, at most, that is printed before training


def table(found):
    """crosstab of {split: Samples}, or where it is long a line that says how to see it."""
    first = next(iter(found.values()))
    if len(found) * len(first.classes) <= ROWS:
        return crosstab(found)
    return f"{first.title}: {len(first.classes)} classes; python data.py --root PATH prints how many images each has"


def read(name, root, size, seed):
    """Every split of a benchmark as its loader finds it; UsageError that says which archive is missing."""
    try:
        found = BENCHMARKS[name].load(root, size, seed)
    except NotThere as error:
        if above := too_deep(root, error.paths):
            raise UsageError(f"{name}: --root {root} is too deep, give {above}") from None
        if not BENCHMARKS[name].classes:
            raise UsageError(f"{name}: {error}; expected {BENCHMARKS[name].layout}; name the folder with --root"
                             ) from None
        offline = "; or use --mini, which needs no download" if name in miniature.BENCHMARKS else ""
        raise UsageError(f"{name}: {error}. Unpack {BENCHMARKS[name].source} under --root{offline}") from None
    for samples in found.values():
        samples.pipeline = BENCHMARKS[name].pipeline
    return found


def judge(benchmark, split, samples, root, limit):
    """UsageError for a split without images of a class; how it differs from the published one goes to its `differs`.

    A miniature and a limit differ on purpose.
    """
    what, where = f"{samples.name} {split}", f"under {root.resolve()}"
    if not len(samples):
        raise UsageError(f"{what}: no images {where}; expected {benchmark.layout}")
    if is_miniature(root):
        return
    known = len(samples.classes)
    if benchmark.classes and known != benchmark.classes:
        raise UsageError(f"{what}: {known} classes {where}, not {benchmark.classes}; unpack {benchmark.source} again")
    empty = [c for c, n in zip(samples.classes, samples.labels.bincount(minlength=known)) if not n]
    if empty and not samples.partial:
        raise UsageError(f"{what}: no images of {', '.join(empty[:3])} {where} ({len(empty)} of {known} classes have "
                         f"none); unpack {benchmark.source} again")
    if not limit and split in benchmark.counts:
        differs = samples.differs, difference(samples, benchmark.counts[split])
        samples.differs = "; ".join(filter(None, differs))


def difference(samples, releases):
    """How the counts of a split differ from those of the nearest release -> text, "" if they do not.

    releases: of each, images by group, or one number for all.
    """
    groups = samples.groups.bincount(minlength=len(samples.group_names)).tolist()

    def off(published):
        found = zip(groups, samples.group_names) if len(published) > 1 else [(sum(groups), "images")]
        return [f"{n} {name} instead of {right}" for (n, name), right in zip(found, published) if n != right]
    found = min(map(off, releases), key=len)
    return ", ".join(found[:4]) + f" and {len(found) - 4} more" * (len(found) > 4)


# ---------------------------------------------------------------- the table
@dataclass(frozen=True)
class Benchmark:
    """What the command line, the errors, the reports and the README say about a benchmark; settings are the paper's."""
    load: Callable               # (root, size, seed) -> {split: Samples}
    classes: int                 # 0: any
    size: int                    # pixels
    k: int                       # parts, as in the paper's main tables
    layout: str                  # under --root
    source: str                  # archive and where it comes from
    licence: str
    metrics: tuple               # names in report.json
    paper: dict                  # {parts: {metric or set: number in the paper's tables}}
    counts: dict                 # {split: published releases, of each the images by group, or (all of them,)}
    pipeline: Pipeline = FINE_GRAINED                    # how its images reach the model
    settings: dict = field(default_factory=dict)         # of train.Config, where they are not its defaults
    rare: tuple = ()             # groups that are rare in training: the paper's worst group is the worst of these
    sets: tuple = ()             # splits that are measured beside "test"
    trained_on: str = ""         # only for evaluation: the benchmark that its models train on
    paper_split: str = "test"    # the split that the paper's numbers are of
    survey: Callable = None      # instead of Samples.check: ({split: Samples}, splits to check) -> lines to say


BENCHMARKS = {
    "waterbirds": Benchmark(
        load_waterbirds, 2, 518, 8,
        "CUB_200_2011/waterbird_complete95_forest2water2/metadata.csv and images (or beside CUB_200_2011; or as WILDS "
        "unpacks it, waterbirds_v1.0); masks and keypoints are used where CUB's segmentations/ and parts/ are there",
        "waterbird_complete95_forest2water2.tar.gz (nlp.stanford.edu/data/dro; masks and keypoints: CUB_200_2011)",
        "images under CUB's and Places' terms", ("aa", "aa_train_weighted", "worst_group", "worst_group_rare"),
        {8: {"aa": 99.0, "worst_group_rare": 97.0}, 16: {"aa": 98.8, "worst_group_rare": 97.0}},
        {"train": [(3498, 184, 56, 1057)], "val": [(467, 466, 133, 133)], "test": [(2255, 2255, 642, 642)]},
        rare=(1, 2)),
    "cub": Benchmark(
        load_cub, 200, 518, 8,
        "CUB_200_2011/images.txt, images/, parts/, bounding_boxes.txt, and segmentations/ moved into it from its own "
        "archive",
        "CUB_200_2011.tgz, and segmentations.tgz moved into it (data.caltech.edu/records/65de6-vp158 and w9d68-gec53)",
        "non-commercial research", ("aa",), {4: {"aa": 90.1}, 8: {"aa": 90.4}, 16: {"aa": 90.6}},
        {"train": [(5994,)], "test": [(5794,)]}),
    "waterbird200": Benchmark(
        load_waterbird200, 200, 518, 8,
        "CUB_200_2011 with images.txt, and waterbird_complete95_forest2water2 inside or beside",
        "CUB_200_2011.tgz and waterbird_complete95_forest2water2.tar.gz (see cub and waterbirds)",
        "as cub and waterbirds", ("aa",),
        {4: {"aa": 86.1, "foreground_iou": 63.7}, 8: {"aa": 86.2, "foreground_iou": 68.6},
         16: {"aa": 86.2, "foreground_iou": 70.2}}, {"train": [(5994,)], "test": [(5794,)]}, trained_on="cub"),
    "metashift": Benchmark(
        load_metashift, 2, 224, 4, "MetaDatasetCatDog/{train,test}/{cat,dog}/<animal>(<context>)/<id>.jpg",
        "metashifts.zip (links in github.com/Wuyxin/DISC)", "code MIT; images under Visual Genome's terms",
        ("aa", "worst_group"), {4: {"aa": 88.7, "worst_group": 88.6}, 8: {"aa": 84.5, "worst_group": 78.8}},
        {"train": [(611, 0, 0, 512)], "test_and_val": [(235, 0, 306, 0)]}, sets=("test_and_val",),
        paper_split="test_and_val", settings={"presence_window": 3}),
    "siim": Benchmark(
        load_siim, 2, 518, 8,
        "siim/dicom-images-train/<study>/<series>/<image>.dcm, train-rle.csv and cxr_tube_dict.pkl (or .csv with "
        "columns ImageId,chest_tube); or the published code's siim/train_set/{0,1}/, full_test_set/ and so on",
        "kaggle.com/datasets/jesperdramsch/siim-acr-pneumothorax-segmentation-data, and cxr_tube_dict.pkl "
        "(github.com/khaledsaab/spatial_specificity)", "Kaggle's competition rules; tube labels Apache-2.0",
        ("auroc", "aa", "worst_group"), {8: {"auroc": 92.1, "robust": 65.9}},
        {"train": [(6798, 1926), (7880, 2216)], "test": [(1306, 192, 120, 333)], "robust": [(0, 192, 120, 0)],
         "non_robust": [(1306, 0, 0, 333)]}, rare=(1, 2),
        sets=("robust", "non_robust"), pipeline=RADIOGRAPHS,
        settings={"weights": "rad-dino", "registers": 0, "weight_background": 0.0}),
    "imagenet": Benchmark(
        load_imagenet, 1000, 224, 1, "imagenet/{train,val}/<wnid>/<file>.JPEG; of a part of the classes also Kaggle's "
        "LOC_synset_mapping.txt beside imagenet/",
        "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (image-net.org)", "registration, non-commercial research",
        ("aa",), {1: {"aa": 84.3}}, {"train": [(1281167,)], "test": [(50,) * 1000]},
        pipeline=PHOTOGRAPHS, settings={"epochs": 120, "ema": 0.9999, "presence_window": 3}),
    "imagenet9": Benchmark(
        load_imagenet9, 9, 224, 1, "bg_challenge/<variant>/val/<class>/<file>.JPEG and fg_mask/val/<class>/<file>.npy",
        "backgrounds_challenge_data.tar.gz (github.com/MadryLab/backgrounds_challenge, release \"data\")",
        "none stated; images are ImageNet's", ("aa", "bg_gap"),
        {1: {"aa": 97.5, "mixed_same": 93.5, "mixed_rand": 91.1, "bg_gap": 2.4}},
        {name: [(450,) * 9] for name in ("test", *IN9_VARIANTS[1:])}, pipeline=AS_THEY_ARE, sets=IN9_VARIANTS[1:],
        trained_on="imagenet"),
    "folder": Benchmark(
        folder.load_folder, 0, 224, 4, folder.LAYOUT, "pictures of your own, --root names their folder", "your own",
        ("aa", "aa_train_weighted", "worst_group"), {}, {}, survey=folder.survey),
}


SPLITS = ("test", "val", "train", *dict.fromkeys(name for b in BENCHMARKS.values() for name in b.sets))


def overview():
    """For --help: every benchmark with its classes, and what is for evaluation only."""
    only = lambda b: f", only to evaluate a model of {b.trained_on}" * bool(b.trained_on)
    known = lambda b: f"{b.classes} classes{only(b)}" if b.classes else "pictures of your own under --root"
    return "; ".join(f"{name}: {known(b)}" for name, b in BENCHMARKS.items())


def docs_table():
    """The table of benchmarks in docs/data.md, as Markdown."""
    lines = ["| `--data` | classes | size | K | layout under `--root` | from | terms | paper |", "|---" * 8 + "|"]
    for name, b in BENCHMARKS.items():
        paper = "; ".join(f"K={k}: " + ", ".join(f"{m} {v}" for m, v in row.items()) for k, row in b.paper.items())
        only = f" (evaluates models of `{b.trained_on}`)" * bool(b.trained_on)
        lines.append(f"| `{name}`{only} | {b.classes or 'any'} | {b.size} | {b.k} | {b.layout.replace('<', '&lt;')} | "
                     f"{b.source} | {b.licence} | {paper} |")
    return "\n".join(lines)


def available(name, root="data"):
    """For notebooks: are the files of a benchmark under root? Prints which data there are, and if not why not."""
    here = BENCHMARKS[name]
    try:
        read(name, Path(root), here.size, 0)
    except UsageError as error:
        why = str(error).removeprefix(f"{name}: ").replace(str(Path(root).resolve()), str(root))
        print(f"{name}: {'the miniature' if name in miniature.BENCHMARKS else 'not there'} ({why})")
        return False
    print(f"{name}: the real benchmark under {root}" if here.classes else f"{name}: your pictures under {root}")
    return True


def title_of(name, root):
    """What the runs and reports of some data are called: the benchmark's name, or of a folder of one's own its own."""
    return folder.title_of(root) if name == "folder" else name


def report_name(samples, mini=False):
    """What a report calls the data of a split: "waterbirds-mini", "folder photos"."""
    return f"folder {samples.title}" if samples.name == "folder" else samples.name + "-mini" * mini


def benchmark_of(title):
    """The benchmark of what a report calls its data: "waterbirds-mini" -> "waterbirds", "folder photos" -> "folder"."""
    return "folder" if title.startswith("folder ") else title.removesuffix("-mini")


def measured(splits, wanted="test", known=SPLITS):
    """The split to measure on, {split: Samples} -> Samples. A folder of one's own without test: val, and it is said.

    UsageError that names the splits that are known where there is no such split.
    """
    first = next(iter(splits.values()))
    if wanted == "test" and "test" not in splits and "val" in splits and first.name == "folder":
        say(f"{first.title} has no test split: measured on val, on which the best epoch was chosen too")
        return splits["val"]
    if wanted not in splits:
        held = "train with --val-share 0.1 to have one, or " * ("val" not in splits and "train" in splits)
        raise UsageError(f"{first.title} has no split {wanted!r}; {held}choose another --split: "
                         f"{', '.join(split for split in splits if split in known)}")
    return splits[wanted]


def find_root(name, root, mini):
    """The folder to read: `root` as it is, or the rendered miniature of the benchmark (rendered on first use)."""
    if not mini:
        return Path(root)
    if name == "folder":
        raise UsageError("--mini draws a benchmark, and --data folder is your own pictures: leave out one of them (the "
                         "small network and short schedule of --mini alone are --recipe mini)")
    if name not in miniature.BENCHMARKS:
        raise UsageError(f"there is no miniature of {name} yet (there is one of: {', '.join(miniature.BENCHMARKS)})")
    return miniature.render(name)


# ---------------------------------------------------------------- the command
@dataclass
class Config:
    """What to look at."""
    root: str = opt("data", "folder of your pictures; of a benchmark, the folder that holds the unpacked archives")
    data: str = opt("folder", "folder: pictures of your own; or a benchmark", choices=tuple(BENCHMARKS))
    mini: bool = opt(False, "use the miniature of the benchmark: drawn on first use, no download")
    sheet: str = opt("", "also draw some pictures of each group, with the outlines of their masks, into this .png file")
    force: bool = opt(False, "replace a picture that this program did not draw")


def contact_sheet(splits, columns=8, side=96, most=60):
    """{name: Samples} -> PIL picture: a row for each group of each split, with pictures spread evenly over its files.

    Pictures are whole, with the outline of their true mask. Of more than `most` rows as many, spread evenly.
    """
    rows = [(some, group, (some.groups == group).nonzero()[:, 0].tolist()) for some in splits.values()
            for group in some.groups.unique().tolist()]
    if len(rows) > most:
        say(f"the sheet shows {most} of {len(rows)} groups, spread evenly")
        rows = [rows[i * len(rows) // most] for i in range(most)]
    names = [f"{some.split}: {len(mine)}\n{some.group_names[group]}" for some, group, mine in rows]
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    words = 12 + max(round(draw.multiline_textbbox((0, 0), name)[2]) for name in names)
    sheet = Image.new("RGB", (words + columns * side, len(rows) * side), "white")
    for y, (some, group, mine) in enumerate(rows):
        count = min(columns, len(mine))
        ImageDraw.Draw(sheet).text((4, y * side + side // 3), names[y], fill="black")
        for x in range(count):
            sheet.paste(shown(some, mine[x * len(mine) // count], side - 2), (words + x * side + 1, y * side + 1))
    return sheet


def shown(some, i, side):
    """Sample i of a split as a square picture of this side."""
    picture = ImageOps.pad(some.read(some.paths[i], "RGB"), (side, side), color="white")
    if some.masks:
        mask = some.read(some.masks[i], "L").point(lambda value: 255 * (value > 0))
        mask = ImageOps.pad(mask, (side, side), Image.Resampling.NEAREST, color=0)
        edge = ImageChops.difference(mask, mask.filter(ImageFilter.MinFilter(3)))
        picture.paste("magenta", (0, 0), edge)
    return picture


def main(argv=None):
    given = parse(Config, __doc__, argv)
    if given.sheet:
        check_sheet(given.sheet, given.force)
    splits = load(given.data, find_root(given.data, given.root, given.mini))
    if given.data != "folder" or table(splits) != crosstab(splits):              # else it was printed
        print(crosstab(splits))
    if given.sheet:
        write_sheet(given.sheet, contact_sheet(splits))
        print(f"  wrote {given.sheet}")


if __name__ == "__main__":
    run_script(main)
