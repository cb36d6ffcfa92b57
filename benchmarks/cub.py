"""cub.py: CUB-200-2011, Waterbirds and Waterbird200, which show the same birds. Floor: data; read samples.py first."""
from pathlib import Path

import numpy as np

from benchmarks.files import read_csv, there
from benchmarks.samples import Samples
from settings import UsageError


def read_table(path):
    """A text file of CUB, "<id> <rest of line>" -> {id: rest}."""
    return dict(line.split(" ", 1) for line in there(path).read_text().splitlines() if line.strip())


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


def annotations(cub, ids, files):
    """Samples' masks, points and boxes of these images, from CUB's folder; None where it has none of a kind.

    UsageError where the file of a kind lacks an image.
    """
    masks, found = cub / "segmentations", {}
    for kind, path, read in (("points", cub / "parts" / "part_locs.txt", read_points),
                             ("boxes", cub / "bounding_boxes.txt", read_boxes)):
        rows = read(path) if path.is_file() else None
        if rows is not None and (absent := [i for i in ids if i not in rows]):
            raise UsageError(f"{path} has no row of image {absent[0]}; unpack CUB again")
        found[kind] = rows and [rows[i] for i in ids]
    return {"masks": [masks / Path(f).with_suffix(".png") for f in files] if masks.is_dir() else None, **found}


def load_cub(root, size, seed):
    """CUB-200-2011 (Wah et al., 2011). No validation split; the class list gives the labels."""
    cub = root / "CUB_200_2011"
    names, classes = read_table(cub / "images.txt"), read_table(cub / "classes.txt")
    labels, is_train = read_table(cub / "image_class_labels.txt"), read_table(cub / "train_test_split.txt")
    index = {c: i for i, c in enumerate(sorted(classes, key=int))}
    for i in names:
        if labels.get(i) not in index or is_train.get(i) not in ("0", "1"):
            raise UsageError(f"{cub}: image {i} of images.txt has class {labels.get(i)} and split {is_train.get(i)} in "
                             "the other files; unpack CUB again")
    everything = Samples("cub", "all", size, [classes[c] for c in index], list(names),
                         [cub / "images" / f for f in names.values()], [index[labels[i]] for i in names], seed=seed,
                         **annotations(cub, names, names.values()))
    return {name: everything.part(name, [n for n, i in enumerate(names) if is_train[i] == flag])
            for name, flag in (("train", "1"), ("test", "0"))}


def waterbirds(root, name):
    """A file or folder of Waterbirds, inside CUB's folder, as it is normally unpacked, or beside it."""
    return there(*(base / "waterbird_complete95_forest2water2" / name for base in (root / "CUB_200_2011", root)))


def load_waterbirds(root, size, seed):
    """Waterbirds (Sagawa et al., 2020): metadata.csv, and CUB's masks and keypoints where CUB is there too.

    group = 2 * y + place. The three species that the original script mislabelled keep the file's y.
    """
    table = waterbirds(root, "metadata.csv")
    rows = read_csv(table, "img_id", "img_filename", "y", "split", "place")
    for line, row in rows:
        for column, known in (("y", "01"), ("place", "01"), ("split", "012")):
            if row.get(column) not in tuple(known):
                raise UsageError(f"{table}, line {line}: {column} is {row.get(column)!r}, not one of "
                                 f"{', '.join(known)}; unpack the archive again")
    ids, files, y, place, split = ([row[column] for _, row in rows]
                                   for column in ("img_id", "img_filename", "y", "place", "split"))
    everything = Samples("waterbirds", "all", size, ("landbird", "waterbird"), ids, [table.parent / f for f in files],
                         list(map(int, y)), ("on land", "on water"), [2 * int(a) + int(b) for a, b in zip(y, place)],
                         seed=seed, **annotations(root / "CUB_200_2011", ids, files))
    return {name: everything.part(name, [i for i, s in enumerate(split) if s == str(number)])
            for number, name in enumerate(("train", "val", "test"))}


def load_waterbird200(root, size, seed):
    """CUB's 200-way test protocol on the images of Waterbirds. Its metadata.csv has another split and is not read.

    train is CUB's own, original images: keypoint regression is fitted on them.
    """
    splits, base = load_cub(root, size, seed), waterbirds(root, ".")
    test = splits["test"]
    test.name, test.paths = "waterbird200", [base / p.relative_to(root / "CUB_200_2011" / "images") for p in test.paths]
    return splits
