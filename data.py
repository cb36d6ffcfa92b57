"""data.py: benchmarks as they lie on disk -> samples and groups. One table, BENCHMARKS, says what each one is.

    train = load("waterbirds", root="data", size=518)["train"]
    train[epoch, index]      # {"image": (3, S, S), "label": int, "group": int, "id": str}, the same at every call

Every split of every benchmark is a Samples (samples.py); a loader finds its files, labels, groups and annotations.
"""
import copy
import csv
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import numpy as np
import torch

import miniature
import siim
from samples import Names, Samples, describe
from settings import UsageError
from transforms import AS_THEY_ARE, PHOTOGRAPHS, RADIOGRAPHS


# ---------------------------------------------------------------- loaders
def load(name, root="data", size=None, seed=0, limit=0, splits=(), check=True, val_share=0.0):
    """Read a benchmark -> {"train": Samples, "val": Samples, "test": Samples, ...}, those that it has.

    root: folder that holds the unpacked archives; size in pixels (default: the benchmark's); limit: only so many
    samples of each split; splits: only these (default: all); check: every image must be there; val_share: hold out
    this share of the training images, of each class alike, as validation. Raises UsageError when something is not
    where it belongs or is not what the benchmark has.
    """
    benchmark, root = BENCHMARKS[name], Path(root)
    found = benchmark.load(root, size or benchmark.size, seed)
    if val_share:
        if "val" in found or "train" not in found:
            raise UsageError(f"--val-share: {name} has {'its own validation' if 'val' in found else 'no training'} "
                             "split; leave it out")
        train, held = stratified(found["train"].labels, val_share)
        found["val"] = copy.copy(found["train"]).keep(held)
        found["val"].split = "val"
        found["train"].keep(train)
    for split, samples in found.items():
        if len(samples.classes) != benchmark.classes and not (limit or is_miniature(root)):
            raise UsageError(f"{name}: {len(samples.classes)} classes under {root.resolve()}, not {benchmark.classes}; "
                             f"unpack {benchmark.source} again, or try a part of it with --limit")
        if not len(samples):
            raise UsageError(f"{name}: no images of the {split} split under {root.resolve()}; expected "
                             f"{benchmark.layout}")
    if "train" in splits and "train" not in found:
        raise UsageError(f"{name}: no training images under {root.resolve()}; expected {benchmark.layout}")
    found = {split: found[split].first(limit) for split in splits or found if split in found}
    for samples in found.values():
        if check:
            samples.check()
        if int(os.environ.get("RANK", 0)) == 0:
            print(describe(samples))
    return found


def stratified(labels, share, seed=0):
    """Hold out `share` of each class, at least one image -> (indices that stay, indices held out), both sorted.

    The seed is that of the split and not of a run: all runs validate on the same images.
    """
    held = []
    for label in labels.unique().tolist():
        mine = (labels == label).nonzero()[:, 0].numpy()
        held += np.random.default_rng([seed, label]).permutation(mine)[:max(1, round(share * len(mine)))].tolist()
    return sorted(set(range(len(labels))) - set(held)), sorted(held)


def is_miniature(root):
    """Miniatures whose counts differ from the benchmark's carry a file miniature.json."""
    return (root / "miniature.json").is_file()


def drawn_masks(root, names):
    """A miniature's true masks of the object, where its benchmark has none -> their paths, or None.

    names: the images', relative to segmentations/; an iterable that is read only if the masks are there.
    """
    masks = root / "segmentations"
    there = is_miniature(root) and masks.is_dir()
    return [masks / f"{name}.png" for name in names] if there else None


def missing(name, path):
    benchmark = BENCHMARKS[name]
    offline = "; or use --mini, which needs no download" if name in miniature.BENCHMARKS else ""
    return UsageError(f"{name}: looked for {path.resolve()}, which is not there. Unpack {benchmark.source} under "
                      f"--root{offline}")


PHOTOS = (".jpeg", ".jpg", ".png")


def folders(name, path):
    """The folders directly under path, sorted by name -> list of names."""
    try:
        return sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        raise missing(name, path) from None


def files(name, path, *suffixes):
    """The files directly under path with one of these endings, whatever their case, sorted -> list of names."""
    try:
        names = sorted(entry.name for entry in os.scandir(path))
        return [n for n in names if n.lower().endswith(suffixes) and not n.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        raise missing(name, path) from None


def read_table(path):
    """A text file of CUB, "<id> <rest of line>" -> {id: rest}."""
    try:
        return dict(line.split(" ", 1) for line in path.read_text().splitlines() if line.strip())
    except FileNotFoundError:
        raise missing("cub", path) from None


def read_points(path):
    """parts/part_locs.txt -> {image id: (15, 3) array of x, y, visible}."""
    rows = np.loadtxt(path, ndmin=2)                                             # image, part, x, y, visible
    points = {str(int(image)): np.zeros((15, 3)) for image in np.unique(rows[:, 0])}
    for image, part, *at in rows:
        points[str(int(image))][int(part) - 1] = at
    return points


def read_boxes(path):
    """bounding_boxes.txt -> {image id: [x, y, width, height]}."""
    return {i: [float(x) for x in box.split()] for i, box in read_table(path).items()}


def read_annotations(cub):
    """CUB's annotations, every file read once -> a function of (ids, files) that gives Samples' masks, points, boxes.

    None where the folder or file of them is not there at all; UsageError where it lacks an image.
    """
    known = {}
    for key, path, read in (("points", cub / "parts" / "part_locs.txt", read_points),
                            ("boxes", cub / "bounding_boxes.txt", read_boxes)):
        known[key] = path, read(path) if path.is_file() else None

    def of(ids, files):
        masks = cub / "segmentations"
        found = {"masks": [masks / Path(f).with_suffix(".png") for f in files] if masks.is_dir() else None}
        for key, (path, rows) in known.items():
            if rows is not None and (absent := [i for i in ids if i not in rows]):
                raise UsageError(f"{path} has no row of image {absent[0]}; unpack CUB again")
            found[key] = rows and [rows[i] for i in ids]
        return found
    return of


def load_cub(root, size, seed):
    """CUB-200-2011 (Wah et al., 2011). No validation split; the class list gives the labels."""
    cub = root / "CUB_200_2011"
    names, classes = read_table(cub / "images.txt"), read_table(cub / "classes.txt")
    labels, is_train = read_table(cub / "image_class_labels.txt"), read_table(cub / "train_test_split.txt")
    index, annotations = {c: i for i, c in enumerate(sorted(classes, key=int))}, read_annotations(cub)
    for i in names:
        if labels.get(i) not in index or is_train.get(i) not in ("0", "1"):
            raise UsageError(f"{cub}: image {i} of images.txt has class {labels.get(i)} and split {is_train.get(i)} in "
                             "the other files; unpack CUB again")

    def split(name, flag):
        ids = [i for i in names if is_train[i] == flag]
        return Samples("cub", name, size, [classes[c] for c in index], ids, [cub / "images" / names[i] for i in ids],
                       [index[labels[i]] for i in ids], seed=seed, **annotations(ids, [names[i] for i in ids]))
    return {"train": split("train", "1"), "test": split("test", "0")}


def waterbirds_folder(root):
    """Inside CUB's folder, as it is normally unpacked, or beside it."""
    inside, beside = (base / "waterbird_complete95_forest2water2" for base in (root / "CUB_200_2011", root))
    return beside if beside.is_dir() and not inside.is_dir() else inside


def load_waterbirds(root, size, seed):
    """Waterbirds (Sagawa et al., 2020): metadata.csv, and CUB's masks and keypoints where CUB is there too.

    group = 2 * y + place. The three species that the original script mislabelled keep the file's y.
    """
    cub, base = root / "CUB_200_2011", waterbirds_folder(root)
    try:
        with open(base / "metadata.csv", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise missing("waterbirds", base / "metadata.csv") from None
    for column in ("img_id", "img_filename", "y", "split", "place"):
        if not rows or column not in rows[0]:
            raise UsageError(f"{base / 'metadata.csv'} has no column {column}; unpack "
                             f"{BENCHMARKS['waterbirds'].source} again")
    for number, row in enumerate(rows, 2):
        for column, known in (("y", "01"), ("place", "01"), ("split", "012")):
            if row[column] is None or row[column] not in tuple(known):
                raise UsageError(f"{base / 'metadata.csv'}, line {number}: {column} is {row[column]!r}, "
                                 f"not one of {', '.join(known)}; unpack the archive again")
    annotations = read_annotations(cub)

    def split(name, number):
        mine = [r for r in rows if r["split"] == number]
        ids, files = [r["img_id"] for r in mine], [r["img_filename"] for r in mine]
        return Samples("waterbirds", name, size, ("landbird", "waterbird"), ids, [base / f for f in files],
                       [int(r["y"]) for r in mine], ("on land", "on water"),
                       [2 * int(r["y"]) + int(r["place"]) for r in mine], seed=seed, **annotations(ids, files))
    return {"train": split("train", "0"), "val": split("val", "1"), "test": split("test", "2")}


def load_waterbird200(root, size, seed):
    """CUB's 200-way test protocol on the images of Waterbirds. Its metadata.csv has another split and is not read.

    train is CUB's own, original images: keypoint regression is fitted on them.
    """
    splits, base = load_cub(root, size, seed), waterbirds_folder(root)
    if not base.is_dir():
        raise missing("waterbird200", base)
    test = splits["test"]
    test.name, test.paths = "waterbird200", [base / p.relative_to(root / "CUB_200_2011" / "images") for p in test.paths]
    return splits


METASHIFT = {"train": ("cat(sofa)", "cat(bed)", "dog(bench)", "dog(bike)"), "test": ("cat(shelf)", "dog(shelf)")}


def load_metashift(root, size, seed):
    """MetaShift, cat or dog (the version of DISC): these six folders, whatever else an archive has beside them.

    group = 2 * label + outdoors. An id may lie in two contexts of training and counts twice, as published. val is a
    fixed 15 % of the published test images, test the others; test_and_val is all of them, as in the paper.
    """
    base = next((p for p in (root / "MetaDatasetCatDog", root / "metashifts" / "MetaDatasetCatDog") if p.is_dir()),
                root / "MetaDatasetCatDog")

    def split(name, contexts):
        rows = []                                          # label, id, context, path
        for context in contexts:
            animal = context[:3]
            folder = base / name / animal / context
            rows += [(("cat", "dog").index(animal), Path(f).stem, context, folder / f)
                     for f in files("metashift", folder, *PHOTOS)]
        rows.sort()
        paths = [path for *_, path in rows]
        return Samples("metashift", name, size, ("cat", "dog"), [f"{context}/{i}" for _, i, context, _ in rows], paths,
                       [label for label, *_ in rows], ("indoors", "outdoors"),
                       [2 * label + (context in ("dog(bench)", "dog(bike)")) for label, _, context, _ in rows],
                       masks=drawn_masks(root, (p.relative_to(base).with_suffix("") for p in paths)), seed=seed)
    found = {name: split(name, contexts) for name, contexts in METASHIFT.items()}
    everything = found["test"]
    for name, indices in zip(("test", "val"), stratified(everything.labels, 0.15)):
        found[name] = copy.copy(everything).keep(indices)
        found[name].split = name
    everything.split = "test_and_val"
    return {**found, "test_and_val": everything}


def load_siim(root, size, seed):
    """SIIM-ACR Pneumothorax: Kaggle's files with Saab et al.'s chest tubes, or the folders the published code prepares.

    test: every image with a tube label, group = 2 * label + tube; robust, non_robust: the part of it where a tube
    misleads, and where it helps. train: every other image with a label; nobody knows its tubes. The masks are of the
    pneumothorax; those of a miniature are of the lungs, where all evidence lies.
    """
    places = [root / p for p in ("siim", "siim/pneumothorax", "pneumothorax", ".")]
    raw = next((p for p in places if (p / "dicom-images-train").is_dir()), None)
    prepared = next((p for p in places if (p / "train_set").is_dir()), None)
    rows = siim_raw(raw) if raw else siim_prepared(prepared, is_miniature(root)) if prepared else None
    if rows is None:
        raise missing("siim", places[0] / "dicom-images-train")

    def split(name, wanted):
        mine = [r for r in rows if wanted(r)]
        uids, paths, labels, tubes, masks = zip(*mine) if mine else [[]] * 5
        groups = {} if name == "train" else dict(places=("without tube", "with tube"),
                                                 groups=[2 * y + tube for y, tube in zip(labels, tubes)])
        lungs = drawn_masks(root, uids)
        found = Samples("siim", name, size, ("healthy", "pneumothorax"), uids, paths, labels, **groups,
                        masks=lungs or (masks if all(masks) else None), pipeline=RADIOGRAPHS, seed=seed)
        found.masks_tell = lungs is None
        return found
    return {"train": split("train", lambda r: r[3] is None), "test": split("test", lambda r: r[3] is not None),
            "robust": split("robust", lambda r: r[3] is not None and r[2] != r[3]),
            "non_robust": split("non_robust", lambda r: r[2] == r[3])}


def siim_raw(base):
    """Kaggle's layout -> rows (uid, path, label, tube or None, mask). What has no label is left out, and counted."""
    if not (base / "train-rle.csv").is_file():
        raise missing("siim", base / "train-rle.csv")
    tables = [base / name for name in ("cxr_tube_dict.pkl", "cxr_tube_dict.csv")]
    table = next((p for p in tables if p.is_file()), None)
    if table is None:
        raise missing("siim", tables[0])
    runs, tubes, paths = siim.read_runs(base / "train-rle.csv"), siim.read_tubes(table), {}
    for path in sorted((base / "dicom-images-train").glob("*/*/*.dcm")):
        if paths.setdefault(path.name[:-len(".dcm")], path) != path:              # a UID has dots: no stem but this
            raise UsageError(f"siim: {path} and {paths[path.name[:-4]]} have the same UID; unpack the archive again")
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"siim: {len(paths)} images; left out: {len(paths.keys() - runs)} without a row in train-rle.csv, "
              f"{len(runs.keys() - paths)} rows and {len(tubes.keys() - paths)} tube labels without an image")
    return [(uid, path, int(bool(runs[uid].rows)), tubes.get(uid), runs[uid]) for uid, path in paths.items()
            if uid in runs]


def siim_prepared(base, drawn):
    """The published code's folders <set>/<label>/<uid>.dcm -> rows as siim_raw.

    Its all_masks are transposed (and hold one region an image); `drawn`: those of a miniature are upright.
    """
    found = {(s, y): {Path(f).with_suffix("").name: base / s / str(y) / f
                      for f in files("siim", base / s / str(y), ".dcm", ".png", ".jpg")}
             for s in siim.PREPARED for y in (0, 1)}
    masks, rows = base / "all_masks", []
    for (s, y), paths in found.items():
        for uid, path in paths.items() if s in ("train_set", "full_test_set") else ():
            robust, easy = (uid in found[other, y] for other in ("robust_test_set", "non_robust_test_set"))
            if s == "full_test_set" and robust == easy:
                raise UsageError(f"siim: {path} is in {'both' if robust else 'neither'} of robust_test_set and "
                                 "non_robust_test_set; prepare the folders again")
            tube = None if s == "train_set" else int(robust != bool(y))
            mask = siim.Runs(()) if not y else siim.Mask(masks / f"{uid}.png", not drawn) if masks.is_dir() else None
            rows.append((uid, path, y, tube, mask))
    return sorted(rows, key=lambda row: row[0])


def load_imagenet(root, size, seed):
    """ImageNet-1K: <split>/<wnid>/<file>; a class is the rank of its wnid. val is the test split, as in every paper.

    A miniature has few of the 1000 classes and lists their real numbers in miniature.json: {"wnids": {wnid: class}}.
    """
    base = root / "imagenet"
    there = [split for split in ("train", "val") if (base / split).is_dir()]
    listed = {split: folders("imagenet", base / split) for split in there or ["train"]}
    wnids = listed[there[0]]
    for split, names in listed.items():
        if odd := set(names) ^ set(wnids):
            raise UsageError(f"imagenet: {base / 'train'} and {base / 'val'} differ in {sorted(odd)[0]}; val needs the "
                             "same wnid folders (its archive is flat: sort it with the usual valprep script)")
    number, classes = {wnid: i for i, wnid in enumerate(wnids)}, wnids
    if is_miniature(root) and (given := json.loads((root / "miniature.json").read_text()).get("wnids")):
        number = given
        if unknown := [wnid for wnid in wnids if wnid not in number]:
            raise UsageError(f"imagenet: {root / 'miniature.json'} has no class for {unknown[0]}; draw it again")
        classes = [str(i) for i in range(1000)]
        for wnid in wnids:
            classes[number[wnid]] = wnid

    found = {}
    for name, folder in (("train", "train"), ("test", "val")):
        if folder in there:
            blocks = [np.array([os.fsencode(f"{folder}/{wnid}/{f}") for f in
                                files("imagenet", base / folder / wnid, *PHOTOS)], dtype=bytes) for wnid in wnids]
            names = Names(base, np.concatenate(blocks))
            labels = np.repeat([number[wnid] for wnid in wnids], [len(b) for b in blocks])
            masks = drawn_masks(root, (p.relative_to(base).with_suffix("") for p in names))
            found[name] = Samples("imagenet", name, size, classes, names.ids, names, labels, pipeline=PHOTOGRAPHS,
                                  masks=masks, seed=seed)
    return found


IN9_VARIANTS = ("original", "mixed_same", "mixed_rand", "mixed_next", "only_fg", "no_fg", "only_bg_b", "only_bg_t")
IN9 = {     # class: those of ImageNet's 1000 that belong to it, first-last
    "00_dog": "151-170 173-268",
    "01_bird": "7-24 87-100 127-146",
    "02_wheeled vehicle": "407-408 428 436 444 468 511 547 555 561 565 569 573 586 603 609 612 627 656 661 665 670-671 "
                          "675 690 705 717 734 751 757 791 802-803 817 820 829 847 864 866-867 870 880",
    "03_reptile": "33-68",
    "04_carnivore": "269-280 286-299 356-362 387-388",
    "05_insect": "300-326",
    "06_musical instrument": "401-402 420 432 486 494 513 541 546 558 566 577 579 593-594 641-642 683-684 687 699 776 "
                             "822 875 881 889",
    "07_primate": "365-384",
    "08_fish": "0-6 389-397"}


def in9_classes():
    """(1000,): which of the nine classes each class of ImageNet is, -1 for none."""
    merge = torch.full((1000,), -1)
    for c, ranges in enumerate(IN9.values()):
        for part in ranges.split():
            first, *last = map(int, part.split("-"))
            merge[first:(last or [first])[0] + 1] = c
    return merge


def load_imagenet9(root, size, seed):
    """Backgrounds Challenge (Xiao et al., 2021): variants of the same 4,050 images, at the model's size as they are.

    An arg-max over all 1000 outputs is mapped to nine classes; the 630 others are wrong. test is the original images.
    """
    base = root / "bg_challenge"
    drawn = is_miniature(root)

    def variant(name):
        paths, labels = [], []
        there = folders("imagenet9", base / name / "val")
        if there != list(IN9) and not (drawn and set(there) <= set(IN9)):
            raise UsageError(f"imagenet9: {base / name / 'val'} has the folders {', '.join(there)}; expected "
                             f"{', '.join(IN9)}; unpack the archive again")
        for folder in there:
            paths += (mine := [base / name / "val" / folder / f
                               for f in files("imagenet9", base / name / "val" / folder, *PHOTOS)])
            labels += [list(IN9).index(folder)] * len(mine)
        masks = None
        if (base / "fg_mask").is_dir() and name in IN9_VARIANTS[:4]:
            # fg_n02085620_01234_bg_n01530575_05678 stands on the mask of n02085620_01234
            stem = lambda path: re.match(r"(?:fg_)?(.*?)(?:_bg_.*)?$", path.stem)[1]
            masks = [base / "fg_mask" / "val" / p.parent.name / f"{stem(p)}.npy" for p in paths]
        return Samples("imagenet9", name, size, [c[3:] for c in IN9], [f"{name}/{p.stem}" for p in paths], paths,
                       labels, masks=masks, pipeline=AS_THEY_ARE, seed=seed, merge=in9_classes())
    found = {name: variant(name) for name in IN9_VARIANTS
             if name in IN9_VARIANTS[:3] or not drawn or (base / name).is_dir()}
    return {"test": found.pop("original"), **found}


# ---------------------------------------------------------------- the table
@dataclass(frozen=True)
class Benchmark:
    """What the command line, the errors, the reports and the README say about a benchmark; settings are the paper's."""
    load: Callable               # (root, size, seed) -> {split: Samples}
    classes: int
    size: int                    # pixels
    k: int                       # parts, as in the paper's main tables
    layout: str                  # under --root
    source: str                  # archive and where it comes from
    licence: str
    metrics: tuple               # names in report.json
    paper: dict                  # {parts: {metric or set: number in the paper's tables}}
    settings: dict = field(default_factory=dict)         # of train.Config, where they are not its defaults
    rare: tuple = ()             # groups that are rare in training: the paper's worst group is the worst of these
    sets: tuple = ()             # splits that are measured beside "test"
    trained_on: str = ""         # only for evaluation: the benchmark that its models train on


def top1(*rows):
    return {k: {"aa": value} for k, value in rows}


BENCHMARKS = {
    "waterbirds": Benchmark(
        load_waterbirds, 2, 518, 8,
        "CUB_200_2011/waterbird_complete95_forest2water2/metadata.csv and images (or beside CUB_200_2011); masks and "
        "keypoints are used where CUB's segmentations/ and parts/ are there",
        "waterbird_complete95_forest2water2.tar.gz (nlp.stanford.edu/data/dro; masks and keypoints: CUB_200_2011)",
        "images under CUB's and Places' terms", ("aa", "aa_train_weighted", "worst_group", "worst_group_rare"),
        {8: {"aa": 99.0, "worst_group_rare": 97.0}, 16: {"aa": 98.8, "worst_group_rare": 97.0}}, rare=(1, 2)),
    "cub": Benchmark(
        load_cub, 200, 518, 8,
        "CUB_200_2011/images.txt, images/, parts/, bounding_boxes.txt, and segmentations/ moved into it from its own "
        "archive",
        "CUB_200_2011.tgz, and segmentations.tgz moved into it (data.caltech.edu/records/65de6-vp158 and w9d68-gec53)",
        "non-commercial research", ("aa",), top1((4, 90.1), (8, 90.4), (16, 90.6))),
    "waterbird200": Benchmark(
        load_waterbird200, 200, 518, 8,
        "CUB_200_2011 with images.txt, and waterbird_complete95_forest2water2 inside or beside",
        "CUB_200_2011.tgz and waterbird_complete95_forest2water2.tar.gz (see cub and waterbirds)",
        "as cub and waterbirds", ("aa",),
        {4: {"aa": 86.1, "foreground_iou": 63.7}, 8: {"aa": 86.2, "foreground_iou": 68.6},
         16: {"aa": 86.2, "foreground_iou": 70.2}}, trained_on="cub"),
    "metashift": Benchmark(
        load_metashift, 2, 224, 4, "MetaDatasetCatDog/{train,test}/{cat,dog}/<animal>(<context>)/<id>.jpg",
        "metashifts.zip (links in github.com/Wuyxin/DISC)", "code MIT; images under Visual Genome's terms",
        ("aa", "worst_group"), {4: {"aa": 88.7, "worst_group": 88.6}, 8: {"aa": 84.5, "worst_group": 78.8}},
        sets=("test_and_val",)),
    "siim": Benchmark(
        load_siim, 2, 518, 8,
        "siim/dicom-images-train/<study>/<series>/<image>.dcm, train-rle.csv and cxr_tube_dict.pkl (or .csv with "
        "columns ImageId,chest_tube); or the published code's siim/train_set/{0,1}/, full_test_set/ and so on",
        "kaggle.com/datasets/jesperdramsch/siim-acr-pneumothorax-segmentation-data, and cxr_tube_dict.pkl "
        "(github.com/khaledsaab/spatial_specificity)", "Kaggle's competition rules; tube labels Apache-2.0",
        ("auroc", "aa", "worst_group"), {8: {"auroc": 92.1, "robust": 65.9}}, rare=(1, 2),
        sets=("robust", "non_robust"), settings={"weights": "rad-dino", "registers": 0, "weight_background": 0.0}),
    "imagenet": Benchmark(
        load_imagenet, 1000, 224, 1, "imagenet/{train,val}/<wnid>/<file>.JPEG",
        "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (image-net.org)", "registration, non-commercial research",
        ("aa",), top1((1, 84.3)), settings={"epochs": 120, "ema": 0.9999}),
    "imagenet9": Benchmark(
        load_imagenet9, 9, 224, 1, "bg_challenge/<variant>/val/<class>/<file>.JPEG and fg_mask/val/<class>/<file>.npy",
        "backgrounds_challenge_data.tar.gz (github.com/MadryLab/backgrounds_challenge, release \"data\")",
        "none stated; images are ImageNet's", ("aa", "bg_gap"),
        {1: {"aa": 97.5, "mixed_same": 93.5, "mixed_rand": 91.1, "bg_gap": 2.4}}, sets=IN9_VARIANTS[1:],
        trained_on="imagenet"),
}


def overview():
    """For --help: every benchmark with its classes, and what is for evaluation only."""
    only = lambda b: f", only to evaluate a model of {b.trained_on}" * bool(b.trained_on)
    return "; ".join(f"{name}: {b.classes} classes{only(b)}"
                     for name, b in BENCHMARKS.items())


def readme_table():
    """The README's table of benchmarks, as Markdown."""
    lines = ["| `--data` | classes | size | K | layout under `--root` | from | terms | paper |", "|---" * 8 + "|"]
    for name, b in BENCHMARKS.items():
        paper = "; ".join(f"K={k}: " + ", ".join(f"{m} {v}" for m, v in row.items()) for k, row in b.paper.items())
        only = f" (evaluates models of `{b.trained_on}`)" * bool(b.trained_on)
        lines.append(f"| `{name}`{only} | {b.classes} | {b.size} | {b.k} | {b.layout.replace('<', '&lt;')} | "
                     f"{b.source} | {b.licence} | {paper} |")
    return "\n".join(lines)


def available(name, root="data"):
    """For notebooks: are the files of a benchmark under root? Prints which data there are, and if not why not."""
    here = BENCHMARKS[name]
    try:
        here.load(Path(root), here.size, 0)
    except UsageError as error:
        why = str(error).removeprefix(f"{name}: ").replace(str(Path(root).resolve()), str(root))
        print(f"{name}: the miniature ({why})")
        return False
    print(f"{name}: the real benchmark under {root}")
    return True


def find_root(name, root, mini):
    """The folder to read: `root` as it is, or the rendered miniature of the benchmark (rendered on first use)."""
    if not mini:
        return Path(root)
    if name not in miniature.BENCHMARKS:
        raise UsageError(f"there is no miniature of {name} yet (there is one of: {', '.join(miniature.BENCHMARKS)})")
    return miniature.render(name)
