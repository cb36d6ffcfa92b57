"""cub.py: CUB-200-2011, Waterbirds and Waterbird200, which show the same birds. Floor: data; read samples.py first."""
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.files import FILE, ID, TEXT, exists, one_of, read_bytes, read_keyed, read_rows, say, there, within
from benchmarks.samples import Samples
from settings import UsageError

BIT = one_of({"0": 0, "1": 1})
PIXELS = within(float, -10000, 10000)                      # images have at most 500, and a few boxes reach beyond them
PARTS = 15


def read_points(path):
    """parts/part_locs.txt -> {image id: (15, 3) array of x, y, visible}. Every image has a row of every part."""
    points = {}
    for line, image, part, *at in read_rows(path, {"image": ID, "part": within(int, 1, PARTS), "x": PIXELS,
                                                   "y": PIXELS, "visible": BIT}):
        if part in points.setdefault(image, {}):
            raise UsageError(f"{path}, line {line}: part {part} of image {image} a second time")
        points[image][part] = at
    for image, found in points.items():
        if absent := set(range(1, PARTS + 1)) - set(found):
            raise UsageError(f"{path} has no row of part {min(absent)} of image {image}; unpack CUB again")
    return {image: np.array([found[part] for part in range(1, PARTS + 1)]) for image, found in points.items()}


def read_boxes(path):
    """bounding_boxes.txt -> {image id: [x, y, width, height]}."""
    side = within(float, 1, 10000)
    return read_keyed(path, {"image": ID, "x": PIXELS, "y": PIXELS, "width": side, "height": side})


# ---------------------------------------------------------------- attributes of a bird's parts
HEAD = (5, 6, 7, 10, 11, 15)                               # crown, forehead, eyes, nape, throat
REGIONS = {             # what a group of attributes is about: {the word after has_: numbers of the parts that show it}
    "bill": (2,), "wing": (9, 13), "back": (1,), "upperparts": (1,), "breast": (3, 4), "belly": (3, 4),
    "underparts": (3, 4), "tail": (14,), "upper_tail": (14,), "under_tail": (14,), "leg": (8, 12),
    **dict.fromkeys(("head", "throat", "eye", "forehead", "nape", "crown"), HEAD)}
SURE = ("probably", "definitely")                          # certainties that count, of four


class Attributes(NamedTuple):
    """What annotators said of the parts of n birds, a column for each of A groups such as has_bill_color."""
    groups: list                 # A names
    values: list                 # of each group the names of its values
    parts: list                  # of each group the numbers (1 to 15) of the parts that show it
    labels: np.ndarray           # (n, A) index into values; -1: nobody was sure, or it has several


def attribute_names(cub):
    """The archive unpacks attributes.txt beside CUB's folder; it may have been moved into it."""
    return next((path for path in (cub / "attributes" / "attributes.txt", cub.parent / "attributes.txt",
                                   cub / "attributes.txt") if exists(path)), None)


def attributes_missing(cub):
    """Why the attributes cannot be read, as the end of a sentence; "" if their files are there."""
    for name in ("image_attribute_labels.txt", "certainties.txt"):
        if not exists(cub / "attributes" / name):
            return f"CUB_200_2011/attributes/{name} is not there"
    return "" if attribute_names(cub) else "attributes.txt is not there, beside or in CUB_200_2011"


def read_attributes(cub, ids):
    """attributes/image_attribute_labels.txt of CUB's folder for the images with these ids -> Attributes.

    Groups that are about no single region (size, shape, primary colour) are left out. A value counts where it is the
    only one of its group that is marked as present, and with one of the certainties in SURE. A line is <image>
    <attribute> <is present> <certainty> <seconds>; a few of the published ones have further fields, which are not read.
    UsageError for a line that is not like that, and for an image without lines.
    """
    names, place = read_keyed(attribute_names(cub), {"attribute": ID, "name": TEXT}), {}
    groups, values = [], []
    for attribute, name in names.items():
        group, _, value = name.partition("::")
        if region_of(group):
            if group not in groups:
                groups.append(group)
                values.append([])
            place[attribute] = groups.index(group), len(values[groups.index(group)])
            values[groups.index(group)].append(value)
    sure = {number for number, name in read_keyed(cub / "attributes" / "certainties.txt",
                                                  {"certainty": ID, "name": TEXT}).items() if name in SURE}
    row, path = {image: i for i, image in enumerate(ids)}, cub / "attributes" / "image_attribute_labels.txt"
    labels, count = np.full((len(ids), len(groups)), -1), np.zeros((len(ids), len(groups)), int)
    seen, odd = set(), 0
    for number, line in enumerate(read_bytes(path).decode(errors="replace").splitlines(), 1):
        fields = line.split()
        odd += len(fields) > 5
        if len(fields) < 5 and fields or fields and (fields[2] not in ("0", "1") or not fields[0].isdecimal()):
            raise UsageError(f"{path}, line {number}: expected image, attribute, is present (0 or 1), certainty and "
                             f"seconds, found {line[:60]!r}; unpack CUB again")
        if fields and (i := row.get(fields[0])) is not None:
            seen.add(i)
            if fields[2] == "1" and (at := place.get(fields[1])):
                count[i, at[0]] += 1
                labels[i, at[0]] = at[1] if fields[3] in sure and count[i, at[0]] == 1 else -1
    if odd:
        say(f"{path}: {odd} lines have more than five fields; their first four are read")
    if len(seen) < len(row):
        absent = next(image for image, i in row.items() if i not in seen)
        raise UsageError(f"{path} has no line of image {absent}; unpack CUB again")
    return Attributes(groups, values, [region_of(group) for group in groups], labels)


def region_of(group):
    """has_bill_color -> the parts that show a bill, () for what is of no single region."""
    return REGIONS.get(group.removeprefix("has_").rpartition("_")[0], ())


# ---------------------------------------------------------------- the benchmarks
def annotations(cub, ids, files):
    """Samples' annotations of these images, from CUB's folder; None where it has none of a kind.

    UsageError where the file of a kind lacks an image.
    """
    masks, found = cub / "segmentations", {}
    for kind, path, read in (("points", cub / "parts" / "part_locs.txt", read_points),
                             ("boxes", cub / "bounding_boxes.txt", read_boxes)):
        rows = read(path) if exists(path) else None
        if rows is not None and (absent := [i for i in ids if i not in rows]):
            raise UsageError(f"{path} has no row of image {absent[0]}; unpack CUB again")
        found[kind] = rows and [rows[i] for i in ids]
    return {"masks": [masks / Path(f).with_suffix(".png") for f in files] if exists(masks) else None, **found,
            "attributes": [(cub, i) for i in ids]}         # read when they are asked for: there are 3.7 million lines


def load_cub(root, size, seed):
    """CUB-200-2011 (Wah et al., 2011). No validation split; the class list gives the labels."""
    cub = root / "CUB_200_2011"
    table = lambda name, kind: read_keyed(cub / f"{name}.txt", {"id": ID, name: kind})
    names, classes, labels = table("images", FILE), table("classes", TEXT), table("image_class_labels", ID)
    is_train, index = table("train_test_split", BIT), {c: i for i, c in enumerate(sorted(classes, key=int))}
    for i in names:
        if labels.get(i) not in index or i not in is_train:
            raise UsageError(f"{cub}: image {i} of images.txt has class {labels.get(i)} and split {is_train.get(i)} in "
                             "the other files; unpack CUB again")
    everything = Samples("cub", "all", size, [classes[c] for c in index], list(names),
                         [cub / "images" / f for f in names.values()], [index[labels[i]] for i in names], seed=seed,
                         **annotations(cub, names, names.values()))
    return {name: everything.part(name, [n for n, i in enumerate(names) if is_train[i] == flag])
            for name, flag in (("train", 1), ("test", 0))}


def waterbirds(root, name):
    """A file or folder of Waterbirds, inside CUB's folder, as it is normally unpacked, or beside; also WILDS's."""
    if exists(root / "image_class_labels.txt"):            # else it would be found, but without annotations
        raise UsageError(f"--root {root} is CUB's own folder; give the one that holds it, {root.resolve().parent}")
    return there(*(base / folder / name for folder in ("waterbird_complete95_forest2water2", "waterbirds_v1.0")
                   for base in (root / "CUB_200_2011", root)))


def numbers_in_cub(cub, table, ids, files):
    """CUB's ids of Waterbirds' images, by file name: a metadata.csv may be counted anew. Without CUB, the ids given."""
    if not exists(cub / "images.txt"):
        return ids
    known = {f: i for i, f in read_keyed(cub / "images.txt", {"id": ID, "images": FILE}).items()}
    if unknown := [f for f in files if f not in known]:
        raise UsageError(f"{table}: {cub / 'images.txt'} does not know {unknown[0]} (nor {len(unknown) - 1} others); "
                         "unpack both again")
    found = [known[f] for f in files]
    if other := sum(a != b for a, b in zip(ids, found)):
        say(f"waterbirds: img_id of {other} of {len(ids)} rows is not CUB's: annotations are joined by file name")
    return found


def load_waterbirds(root, size, seed):
    """Waterbirds (Sagawa et al., 2020): metadata.csv, and CUB's masks and keypoints where CUB is there too.

    group = 2 * y + place. The three species that the original script mislabelled keep the file's y.
    """
    cub, table = root / "CUB_200_2011", waterbirds(root, "metadata.csv")
    split_of = one_of({"0": "train", "1": "val", "2": "test"})
    columns = {"img_id": ID, "img_filename": FILE, "y": BIT, "split": split_of, "place": BIT}
    rows = read_rows(table, columns, commas=True)
    ids, files, y, split, place = [[row[n] for row in rows] for n in range(1, 6)]
    everything = Samples("waterbirds", "all", size, ("landbird", "waterbird"), ids, [table.parent / f for f in files],
                         y, ("on land", "on water"), [2 * a + b for a, b in zip(y, place)], seed=seed,
                         **annotations(cub, numbers_in_cub(cub, table, ids, files), files))
    return {name: everything.part(name, [i for i, s in enumerate(split) if s == name])
            for name in ("train", "val", "test")}


def load_waterbird200(root, size, seed):
    """CUB's 200-way test protocol on the images of Waterbirds. Its metadata.csv has another split and is not read.

    train is CUB's own, original images: keypoint regression is fitted on them.
    """
    splits, base = load_cub(root, size, seed), waterbirds(root, ".")
    test = splits["test"]
    test.name = test.title = "waterbird200"
    test.paths = [base / p.relative_to(root / "CUB_200_2011" / "images") for p in test.paths]
    return splits
