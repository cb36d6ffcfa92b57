"""compose.py: a data set with a shortcut of your own: cut-outs of objects pasted on photographs of places.

    python compose.py --objects cutouts --backgrounds photographs --out data/mine
    python train.py --data folder --root data/mine

--objects is a folder of folders, one for each class, of pictures with alpha: every file is one individual.
--backgrounds is a folder of folders, one for each place, of photographs. Either may be a csv table instead, with the
columns file, label (or place), and where wanted split and crop (left top right bottom of the part to use, as shares).
--agreement says how many of a class's training pictures show it where it is at home; val and test are balanced.
A file belongs to one split: test shows other individuals on other photographs. A folder DIR/<class>/{train,val,test}
or the column split decides which; otherwise files are dealt by --shares.
What is written is read by `--data folder`: metadata.csv, images, masks (the alpha that was pasted), and a README.

Floor: commands. Read benchmarks/samples.py before (patch_keep). Random numbers are a function of (seed, split, index),
so that pictures do not depend on the number of processes.
Letters: S side of a picture, C classes, P places.
"""
import functools
import math
import os
import shlex
import zlib
from collections import Counter
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, ImageFilter

from benchmarks.files import FILE, PICTURES, Kind, folders, not_empty, one_of, read_image, read_rows
from benchmarks.folder import below
from benchmarks.samples import patch_keep
from measure.leakage import admitted, linear_head
from miniature.scenes import in_parallel, save
from runs import hash_of
from settings import (UsageError, check_range, flag, nearest, need_room, new_folder, opt, parse, run_script, write_csv)

SPLITS = ("train", "val", "test")
FAINT = 13              # alpha of less than 5 %: an invisible veil, which the mask would count as object
FINER = 2               # pasted at so many times the resolution, then averaged
FIRST_LINE = "Composed by compose.py of iFAM: cut-outs of objects on photographs of places"


@dataclass
class Config:
    objects: str = opt(MISSING, "folder with a folder of cut-outs for each class, or a csv table of files",
                       group="sources")
    backgrounds: str = opt(MISSING, "folder with a folder of photographs for each place, or a csv table of files")
    out: str = opt(MISSING, "folder to write, which must not be there")
    root: str = opt("", "folder that the files of the tables are in (default: that of the table)")
    classes: list[str] = opt((), "use these classes, in this order (default: all, by name)")
    places: list[str] = opt((), "use these places, in this order (default: all, by name)")
    shares: tuple = opt((0.6, 0.2, 0.2), "shares of the individuals of a class, and of the photographs of a place, "
                        "for train, val and test", above=0, below=1)
    shared_objects: bool = opt(False, "the same individuals in all splits; photographs stay apart")
    shared_backgrounds: bool = opt(False, "the same photographs in all splits")
    agreement: float = opt(0.95, "share of a class's training pictures at a place where it is at home: class i and "
                           "place j belong together if i = j modulo the smaller number of the two",
                           at_least=0, at_most=1, group="pictures")
    train: int = opt(2200, "training pictures, as many of each class", at_least=2, at_most=10 ** 7)
    val: int = opt(400, "validation pictures, as many of each class at each place", at_least=4, at_most=10 ** 7)
    test: int = opt(800, "test pictures, as many of each class at each place", at_least=4, at_most=10 ** 7)
    size: int = opt(96, "side of a picture in pixels", at_least=16, at_most=4096)
    sizes: tuple = opt((0.5, 0.75), "smallest and largest object: its longer side, before it is turned, as a "
                       "share of the picture's", at_least=.05, at_most=1)
    rotation: float = opt(15.0, "largest angle that an object is turned by, in degrees either way",
                          at_least=0, at_most=180)
    flips: bool = opt(True, "mirror half of the objects and half of the photographs left to right")
    soft_edges: float = opt(0.0, "width in pixels of a rim that fades inwards, beside the cut-out's own edge",
                            at_least=0, at_most=64)
    crops: tuple = opt((0.6, 1.0), "smallest and largest square of a photograph, as a share of its shorter side",
                       at_least=.05, at_most=1)
    recolour_backgrounds: bool = opt(False, "draw the mean colour, the hues and the brightness of each background at "
                                     "random: then the rims that patches admit do not tell the place by colour")
    format: str = opt("png", "of the pictures; jpg is smaller and blurs the rim of an object a little",
                      choices=("png", "jpg"))
    patch: int = opt(8, "side of a model's patches at this size, for the report of what they admit", at_least=1)
    seed: int = opt(0, "a picture depends on (seed, split, index) and the sources only", at_least=0, below=2 ** 63,
                    group="run")
    workers: int = opt(0, "processes (0: as many as there are cores)", at_least=0, at_most=256)


# ---------------------------------------------------------------- sources
class Source(NamedTuple):
    """A file to paste, or to paste on."""
    path: Path
    name: str           # as written in the README and in metadata.csv
    kind: str           # its class or place
    split: str          # "" where shares decide
    crop: tuple         # left, top, right, bottom, as shares


WHOLE = (0.0, 0.0, 1.0, 1.0)


def part(text):
    """ "0 0 1 0.6" -> the part of a picture to use, as shares; "" is all of it."""
    left, top, right, bottom = box = tuple(map(float, text.split())) or WHOLE
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError
    return box


OPTIONAL = {"split": one_of({split: split for split in SPLITS} | {"": ""}),
            "crop": Kind("left top right bottom as shares from 0 to 1, or nothing", part)}


def find_sources(path, what, root=""):
    """A folder of folders or a csv table -> [Source], sorted by kind and name. what: "label" or "place".

    UsageError where there is neither, and for a line of the table that is not as expected. Files are not opened.
    """
    path = Path(path)
    found = from_table(path, what, root) if path.is_file() else from_folder(path)
    if not found:
        raise UsageError(f"{path} has no pictures in folders below it: expected {path}/<{what}>/<picture>, or a csv "
                         f"table with the columns file and {what}")
    return sorted(found, key=lambda source: (source.kind, source.name))


def from_table(path, what, root):
    found, columns = {}, {"file": FILE, what: Kind(f"a {what}", not_empty), **OPTIONAL}
    for line, file, kind, split, crop in read_rows(path, columns, commas=True, optional=list(OPTIONAL)):
        if file in found:
            raise UsageError(f"{path}, line {line}: {file} a second time; a file belongs to one {what}")
        found[file] = Source(Path(root or path.parent) / file, file, kind, split or "", crop or WHOLE)
    return list(found.values())


def from_folder(path):
    found, other = [], 0
    for kind in folders(path):
        for name in below(path, kind):
            split = name.split("/")[1]                   # DIR/<class>/test/x.png: the folder decides
            if name.lower().endswith(PICTURES):
                found.append(Source(path / name, name, kind, split if split in SPLITS else "", WHOLE))
            else:
                other += 1
    if other:
        print(f"{path}: files left out because they do not end as pictures do: {other}")
    return found


def choose(sources, wanted, setting):
    """The kinds to use, in order -> {kind: its sources}; UsageError for an unknown one, and for fewer than two."""
    known = sorted({source.kind for source in sources})
    if unknown := next((name for name in wanted if name not in known), None):
        raise UsageError(f"{flag(setting)}: there is no {unknown}{nearest(unknown, known)} (one of: "
                         f"{', '.join(known)})")
    if len(set(wanted)) < len(wanted):
        raise UsageError(f"{flag(setting)} names one of {', '.join(wanted)} twice")
    kinds = list(wanted or known)
    if len(kinds) < 2:
        raise UsageError(f"{flag(setting)}: found {', '.join(kinds)} alone; a shortcut needs two {setting} at least")
    return {kind: [source for source in sources if source.kind == kind] for kind in kinds}


def inspect(source, cut_out):
    """SHA-256 of a file that decodes as what it has to be; UsageError if not. cut_out: it needs alpha."""
    picture = open_source(source, "RGBA" if cut_out else "RGB")
    if cut_out:
        low, high = picture.getchannel("A").getextrema()
        if low == 255:
            raise UsageError(f"{source.path} is opaque everywhere: a cut-out needs alpha; make what is not the object "
                             "transparent, and save it as PNG")
        if high < FAINT:
            raise UsageError(f"{source.path} is transparent everywhere: there is no object in it; remove the file")
    return hash_of(source.path)


def open_source(source, mode):
    """A source -> PIL image, upright, the part to use of it."""
    picture = read_image(source.path, mode, upright=True)
    left, top, right, bottom = (round(n * share) for n, share in zip(picture.size * 2, source.crop))
    return picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def without_copies(groups, hashes, what):
    """{kind: sources} without the second of two files of one content; UsageError if they are of two kinds."""
    first, kept = {}, {}
    for kind, sources in groups.items():
        kept[kind] = []
        for source in sources:
            other = first.setdefault(hashes[source], source)
            if other is source:
                kept[kind].append(source)
            elif (other.kind, other.split) != (source.kind, source.split):
                where = lambda s: f"{s.name} ({' '.join(filter(None, (s.kind, s.split)))})"
                raise UsageError(f"{where(other)} and {where(source)} are the same file; a {what} belongs to one "
                                 "class or place and one split")
            else:
                print(f"{source.name} is the same file as {other.name}: left out")
    return kept


def deal(groups, cfg, shared, what, permission):
    """{kind: sources} -> {split: {kind: sources}}, each file in one split, or all in all if shared.

    A split of its own decides; else shares of a random order do, at least one for each split. UsageError where a kind
    has too few for that.
    """
    dealt = {split: {} for split in SPLITS}
    for kind, sources in groups.items():
        fixed = sum(bool(source.split) for source in sources)
        if shared:
            for split in SPLITS:
                dealt[split][kind] = sources
            continue
        if 0 < fixed < len(sources):
            raise UsageError(f"{what} {kind}: {fixed} of {len(sources)} files have a split of their own; give one to "
                             "all of a kind, or to none")
        if fixed:
            mine = [[s for s in sources if s.split == split] for split in SPLITS]
            if empty := next((split for split, some in zip(SPLITS, mine) if not some), None):
                raise UsageError(f"{what} {kind} has no file for {empty}; give it one, or {permission}")
        else:
            if len(sources) < 3:
                raise UsageError(f"{what} {kind} has {len(sources)} files, and train, val and test need one each that "
                                 f"the others do not have; add some, or {permission}")
            order = np.random.default_rng([cfg.seed, zlib.crc32(f"{what} {kind}".encode())]).permutation(len(sources))
            val, test = (max(1, round(share * len(sources))) for share in cfg.shares[1:])
            cuts = np.split(order, [max(1, len(sources) - val - test), max(2, len(sources) - test)])
            mine = [[sources[i] for i in sorted(some)] for some in cuts]
        for split, some in zip(SPLITS, mine):
            dealt[split][kind] = some
    return dealt


# ---------------------------------------------------------------- who stands where
class Job(NamedTuple):
    """One picture to compose."""
    split: str
    index: int          # within its split; (seed, split, index) decides what is drawn
    object: Source
    background: Source


def homes(label, classes, places):
    """The places j where class `label` is at home, and the others: label = j modulo the smaller of the two numbers."""
    n = min(classes, places)
    home = [j for j in range(places) if j % n == label % n]
    return home, [j for j in range(places) if j not in home]


def layout(split, count, classes, places, agreement):
    """[(label, place)] of a split. Counts are exact: training agrees at the given rate, val and test are balanced."""
    if split != "train":
        return [(i, j) for i in range(classes) for j in range(places) for _ in range(count // (classes * places))]
    found = []
    for label in range(classes):
        mine = count // classes + (label < count % classes)
        at_home, (home, others) = round(agreement * mine), homes(label, classes, places)
        found += [(label, home[i % len(home)] if i < at_home else others[(i - at_home) % len(others)])
                  for i in range(mine)]
    return found


def plan(cfg, objects, backgrounds):
    """All pictures to compose -> [Job]. Within a class at a place every individual is used as often as the others.

    objects, backgrounds: {split: {kind: sources}}.
    """
    jobs = []
    for number, split in enumerate(SPLITS):
        mine, places = (list(of[split].values()) for of in (objects, backgrounds))
        pairs = layout(split, getattr(cfg, split), len(mine), len(places), cfg.agreement)
        rng, met = np.random.default_rng([cfg.seed, number]), {}
        orders = {pair: (rng.permutation(len(mine[pair[0]])), rng.permutation(len(places[pair[1]])))
                  for pair in dict.fromkeys(pairs)}
        shuffled = rng.permutation(len(pairs))           # so that the order of files tells nothing
        for index, pair in enumerate(pairs[i] for i in shuffled):
            some, where = orders[pair]
            seen = met[pair] = met.get(pair, -1) + 1
            behind = where[(seen // len(some) + seen) % len(where)]      # another one when the same object comes again
            jobs.append(Job(split, index, mine[pair[0]][some[seen % len(some)]], places[pair[1]][behind]))
    return jobs


# ---------------------------------------------------------------- one picture
@functools.lru_cache(maxsize=32)
def photograph(source, size, least):
    """A background, shrunk so far that its smallest square (a share of the shorter side) keeps 2 * size pixels."""
    picture = open_source(source, "RGB")
    enough = math.ceil(2 * size / least)
    if min(picture.size) > enough:
        scale = enough / min(picture.size)
        picture = picture.resize([max(enough, round(n * scale)) for n in picture.size], Image.Resampling.BOX)
    return picture


@functools.lru_cache(maxsize=32)
def cut_out(source):
    """An object -> RGBA, cropped to what is not transparent."""
    picture = open_source(source, "RGBA")
    alpha = picture.getchannel("A").point(lambda a: a if a >= FAINT else 0)
    return picture.crop(alpha.getbbox())


def ground(rng, picture, cfg):
    """A random square of a photograph -> (S, S, 3) float, 0..255."""
    side = min(min(picture.size), max(1, round(rng.uniform(*cfg.crops) * min(picture.size))))
    left, top = (int(rng.integers(n - side + 1)) for n in picture.size)
    square = picture.resize((cfg.size,) * 2, Image.Resampling.BICUBIC, box=(left, top, left + side, top + side),
                            reducing_gap=3)
    if rng.random() < .5 * cfg.flips:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(square, float)


# luma and two chromas from red, green, blue, and back (ITU-R BT.601, as in JPEG)
TO_CHROMA = np.array([[.299, .587, .114], [-.168736, -.331264, .5], [.5, -.418688, -.081312]])
TO_RGB = np.linalg.inv(TO_CHROMA)


def recolour(rng, pixels):
    """(S, S, 3) 0..255 -> the same structure with a random mean colour, its hues turned by a random angle.

    Before clipping the mean brightness, saturation and hue are those drawn, whatever the photograph was.
    """
    x = pixels @ TO_CHROMA.T
    x -= x.mean((0, 1))
    angle, hue, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi), rng.uniform(0, 50)
    c, s = np.cos(angle), np.sin(angle)
    x[..., 1:] = x[..., 1:] @ np.array([[c, s], [-s, c]]) + strength * np.array([np.cos(hue), np.sin(hue)])
    x[..., 0] += rng.uniform(80, 175)
    return (x @ TO_RGB.T).clip(0, 255)


def pasted(rng, picture, cfg):
    """A cut-out, scaled, turned and put somewhere -> (S, S, 4) uint8: its colours, and its alpha at these pixels."""
    S = FINER * cfg.size
    scale = rng.uniform(*cfg.sizes) * S / max(picture.size)
    if rng.random() < .5 * cfg.flips:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = picture.resize([max(1, round(n * scale)) for n in picture.size], Image.Resampling.BICUBIC)
    picture = picture.rotate(rng.uniform(-cfg.rotation, cfg.rotation), Image.Resampling.BICUBIC, expand=True)
    if (box := picture.getchannel("A").getbbox()):
        picture = picture.crop(box)
    corner = [int(rng.integers(S - n + 1)) if n <= S else (S - n) // 2 for n in picture.size]
    canvas = Image.new("RGBA", (S, S))
    canvas.paste(picture, corner)
    canvas = canvas.resize((cfg.size,) * 2, Image.Resampling.BOX)        # of premultiplied colours: no dark rims
    alpha = canvas.getchannel("A")
    if cfg.soft_edges:
        blurred = np.asarray(alpha.filter(ImageFilter.GaussianBlur(cfg.soft_edges / 2)), float)
        alpha = np.minimum(np.asarray(alpha), (2 * blurred - 255).clip(0)).round()
    alpha = np.asarray(alpha).astype(np.uint8)
    return np.dstack([np.asarray(canvas)[..., :3], np.where(alpha < FAINT, 0, alpha)])


def picture_of(job, cfg):
    """A job -> image (S, S, 3) uint8, mask (S, S) uint8: the alpha that was pasted, 255 = opaque."""
    rng = np.random.default_rng([cfg.seed, SPLITS.index(job.split), job.index])
    object = pasted(rng, cut_out(job.object), cfg)
    behind = ground(rng, photograph(job.background, cfg.size, cfg.crops[0]), cfg)
    if cfg.recolour_backgrounds:                         # drawn last: the flag changes colours and nothing else
        behind = recolour(rng, behind)
    alpha = object[..., 3:] / 255
    return (alpha * object[..., :3] + (1 - alpha) * behind).round().astype(np.uint8), object[..., 3]


def file_of(job, cfg, folder):
    """Path of a picture or mask, below the folder that is written."""
    return f"{folder}/{job.split}/{job.index:06d}.{'png' if folder == 'masks' else cfg.format}"


def compose_one(job, cfg, root):
    """Compose a picture and save it and its mask -> share of background in the patches of the true mask, its colour."""
    image, mask = picture_of(job, cfg)
    save(image, root / file_of(job, cfg, "images"))
    save(mask, root / file_of(job, cfg, "masks"))
    return rims(image, mask, cfg.patch)


def rims(image, mask, patch):
    """What patches of the true mask show of the background: its share of their pixels, and its mean colour (3).

    What is less than a patch at the lower and right edge is left out, as models do. NaN where nothing is admitted.
    """
    side = len(mask) // patch * patch
    object = torch.from_numpy(mask[:side, :side] > 0).float()[None]
    keep = patch_keep(object, patch).view(1, 1, side // patch, side // patch)
    shown = torch.nn.functional.interpolate(keep, scale_factor=patch)
    seen = (shown[0, 0] * (1 - object[0])).bool().numpy()
    colour = image[:side, :side][seen].mean(0) if seen.any() else np.full(3, np.nan)
    return admitted(shown, object[:, None]).item(), colour.tolist()


# ---------------------------------------------------------------- what is said of it
def check(cfg):
    """UsageError for settings that contradict each other."""
    for name in ("sizes", "crops"):
        check_range(name, getattr(cfg, name))
    if abs(sum(cfg.shares) - 1) > 1e-6:
        raise UsageError(f"--shares {' '.join(map(str, cfg.shares))}: they are of train, val and test, and must add "
                         f"up to 1, not {sum(cfg.shares):g}")
    if cfg.patch > cfg.size:
        raise UsageError(f"--patch {cfg.patch} is larger than --size {cfg.size}")
    if os.path.lexists(cfg.out):
        mine = " (compose.py wrote it: delete it to compose it anew)" * is_ours(Path(cfg.out))
        raise UsageError(f"--out {cfg.out} is there already{mine}; name a new folder")
    pixels = (cfg.train + cfg.val + cfg.test) * cfg.size ** 2
    need_room(Path(cfg.out).parent, pixels / (4 if cfg.format == "jpg" else 1), "this data set")   # at the very least


def check_counts(cfg, classes, places):
    """UsageError unless every class gets a training picture, and val and test divide into groups of equal size."""
    if cfg.train < classes:
        raise UsageError(f"--train {cfg.train}: there are {classes} classes, and each needs a picture")
    groups = classes * places
    for split in ("val", "test"):
        count = getattr(cfg, split)
        if count % groups:
            near = [n for n in (count // groups * groups, -(-count // groups) * groups) if n]
            raise UsageError(f"--{split} {count}: {classes} classes at {places} places are {groups} groups of equal "
                             f"size; take {' or '.join(map(str, near))}")


def command_of(cfg):
    """The command that composes the same pictures again, with all settings that matter to them."""
    words = ["python compose.py"]
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if f.name in ("out", "workers") or value in ("", ()):
            continue
        if f.type is bool:
            words.append(flag(f.name) if value else flag(f"no_{f.name}"))
        else:
            values = value if isinstance(value, (tuple, list)) else [value]
            words.append(" ".join([flag(f.name), *(shlex.quote(str(x)) for x in values)]))
    return " ".join([*words, "--out FOLDER"])


def counts(jobs, objects, backgrounds):
    """Table of pictures, individuals and photographs by split, class and place -> lines."""
    places = list(backgrounds["train"])
    lines = [f"{'split':8}{'class':24}{'individuals':>12}" + "".join(f"{place:>16}" for place in places)]
    met = Counter((job.split, job.object.kind, job.background.kind) for job in jobs)
    for split in SPLITS:
        for kind, sources in objects[split].items():
            lines.append(f"{split:8}{kind:24}{len(sources):12}" + "".join(f"{met[split, kind, p]:16}" for p in places))
        photographs = "".join(f"{len(sources):16}" for sources in backgrounds[split].values())
        lines.append(f"{split:8}{'(photographs)':24}{'':12}{photographs}")
    return lines


def rim_report(jobs, found, cfg):
    """What patches admit -> lines. found: [(share, colour)] of the jobs."""
    share, colour = torch.tensor([x for x, _ in found]), torch.tensor([x for _, x in found])
    places = list(dict.fromkeys(job.background.kind for job in jobs))
    place = torch.tensor([places.index(job.background.kind) for job in jobs])
    of = lambda split: torch.tensor([job.split == split for job in jobs]) & ~colour.isnan().any(1)
    lines = [f"admitted: patches of {cfg.patch} pixels that the true mask keeps are background for "
             + ", ".join(f"{share[of(split)].nanmean():.1%} of their pixels in {split}" for split in SPLITS)]
    fit, test = of("train"), of("test")
    if min(fit.sum(), test.sum()) >= 10 and len(place[fit].unique()) > 1:
        right = (linear_head(colour[fit], place[fit], len(places), 1e-3)(colour[test]).argmax(1) == place[test])
        lines.append(f"the mean colour of these pixels tells the place of {right.float().mean():.0%} of the test "
                     f"pictures (chance {1 / len(places):.0%}; a linear classifier of training pictures)")
    return lines


def readme(cfg, lines, groups, hashes):
    """What README says of the folder: how it was made, what is in it, of which files. groups: {what: {split: ...}}."""
    text = [FIRST_LINE, "", command_of(cfg), "", f"seed {cfg.seed}; made with numpy {np.__version__} and Pillow "
            f"{PIL.__version__}", "", *lines, "",
            "metadata.csv: a line for each picture. Masks are the alpha that was pasted, 255 = opaque.",
            "Whoever passes these pictures on passes on what is in them: the licences of the files below hold.", "",
            "The files, with the SHA-256 of their bytes and the split that shows them:"]
    for what, dealt in groups.items():
        shown = {}
        for split, kinds in dealt.items():
            for source in (s for sources in kinds.values() for s in sources):
                shown.setdefault(source, []).append(split)
        text += ["", what] + [f"{hashes[s]}  {'+'.join(splits):5}  {s.kind}  {s.name}" for s, splits in shown.items()]
    return "\n".join(text) + "\n"


def is_ours(folder):
    """Did this script write the folder?"""
    try:
        return (folder / "README").read_text(encoding="utf-8").startswith(FIRST_LINE)
    except (OSError, UnicodeDecodeError):
        return False


# ---------------------------------------------------------------- the whole
def gather(cfg):
    """Sources of a command -> objects and backgrounds {split: {kind: sources}}, hashes {source: SHA-256}."""
    found, hashes = {}, {}
    for setting, column, path, wanted in (("classes", "label", cfg.objects, cfg.classes),
                                          ("places", "place", cfg.backgrounds, cfg.places)):
        groups = choose(find_sources(path, column, cfg.root), wanted, setting)
        found[setting] = groups
    check_counts(cfg, *map(len, found.values()))
    for setting, groups in found.items():
        sources = [source for some in groups.values() for source in some]
        read = partial(inspect, cut_out=setting == "classes")
        workers = min(cfg.workers, 1 + len(sources) // 100) or None      # a process starts slowly
        hashes |= dict(zip(sources, in_parallel(read, sources, f"reading {len(sources)} files", workers)))
    objects, backgrounds = (without_copies(groups, hashes, what) for groups, what in
                            zip(found.values(), ("cut-out", "photograph")))
    return (deal(objects, cfg, cfg.shared_objects, "class", "take --shared-objects"),
            deal(backgrounds, cfg, cfg.shared_backgrounds, "place", "take --shared-backgrounds"), hashes)


def compose(cfg):
    """Write the data set -> what is said of it, lines. UsageError for bad sources; cfg.out is whole or not there."""
    check(cfg)
    out = Path(cfg.out)
    objects, backgrounds, hashes = gather(cfg)
    jobs = plan(cfg, objects, backgrounds)
    with new_folder(out) as temporary:
        for top in ("images", "masks"):
            for split in SPLITS:
                (temporary / top / split).mkdir(parents=True)
        write = partial(compose_one, cfg=cfg, root=temporary)
        found = list(in_parallel(write, jobs, "composing", cfg.workers or None))
        write_csv(temporary / "metadata.csv", [
            {"filename": file_of(job, cfg, "images"), "label": job.object.kind, "split": job.split,
             "place": job.background.kind, "mask": file_of(job, cfg, "masks"), "id": f"{job.split}-{job.index:06d}",
             "object": job.object.name, "background": job.background.name} for job in jobs])
        lines = [*counts(jobs, objects, backgrounds), *rim_report(jobs, found, cfg)]
        text = readme(cfg, lines, {"objects": objects, "backgrounds": backgrounds}, hashes)
        (temporary / "README").write_text(text, encoding="utf-8")
    return lines


def main(argv=None):
    cfg = parse(Config, __doc__, argv)
    print("\n".join([*compose(cfg), cfg.out]))


if __name__ == "__main__":
    run_script(main)
