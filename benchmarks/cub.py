"""cub.py: CUB-200-2011, Waterbirds and Waterbird200, which show the same birds. Floor: data; read samples.py first."""
import csv
from pathlib import Path

import numpy as np

from benchmarks.files import NotThere
from benchmarks.samples import Samples
from settings import UsageError


def read_table(path):
    """A text file of CUB, "<id> <rest of line>" -> {id: rest}."""
    try:
        return dict(line.split(" ", 1) for line in path.read_text().splitlines() if line.strip())
    except FileNotFoundError:
        raise NotThere(path) from None


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
        raise NotThere(base / "metadata.csv") from None
    for column in ("img_id", "img_filename", "y", "split", "place"):
        if not rows or column not in rows[0]:
            raise UsageError(f"{base / 'metadata.csv'} has no column {column}; unpack the archive again")
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
        raise NotThere(base)
    test = splits["test"]
    test.name, test.paths = "waterbird200", [base / p.relative_to(root / "CUB_200_2011" / "images") for p in test.paths]
    return splits
