"""cub.py: miniatures of Waterbirds, CUB and Waterbird200, in the layout that benchmarks/cub.py reads.

Floor: data. Read scenes.py first: how anything is drawn. Waterbirds' problem: a bird stands on a coloured backdrop that
says nothing. Behind it lie small things: trees and grass (place = land) or waves and boats (place = water). In training
the place agrees with the kind of bird 95 % of the time, elsewhere it is a coin flip. Land- and waterbirds differ in
shape and in the hue of the head: the bird alone decides.
"""
import csv
from dataclasses import dataclass
from functools import partial

import numpy as np

from miniature.objects import ALL_KINDS
from miniature.scenes import (COAT, PLACE_KINDS, PRETRAIN, Look, Miniature, Row, bird_look, colours, compose, creature,
                              cued, empty, hsv, note, pose, save, save_jpeg, scatter)
from settings import opt

IDS, ORDER, COMPOSITE = PRETRAIN + 1, PRETRAIN + 2, PRETRAIN + 3        # other uses of the seed
PLACES = (("/b/bamboo_forest", "/f/forest/broadleaf"), ("/o/ocean", "/l/lake/natural"))
PARTS = ("back", "beak", "belly", "breast", "crown", "forehead", "left eye", "left leg", "left wing", "nape",
         "right eye", "right leg", "right wing", "tail", "throat")          # in CUB's order


def soft(mask):
    """Covered shares 0..1 -> uint8 in six levels, like the agreement of five annotators."""
    return np.rint(mask * 5).astype(np.uint8) * 51


class CubFolder(Miniature):
    """Base: a folder like CUB's, and one like Waterbirds' inside it."""

    def number(self, examples):
        """[(label, place, split, index)] -> rows with ids and file names as in CUB, sorted by id."""
        order = np.random.default_rng([self.seed, IDS]).permutation(len(examples))  # ids do not tell splits,
        order = sorted(order, key=lambda i: examples[i][0])                         # only classes
        rows, counts = [], [0] * len(self.CLASSES)
        for id, i in enumerate(order, 1):
            label = examples[i][0]
            counts[label] += 1
            name = self.CLASSES[label]
            rows.append(Row(id, f"{name}/{name[4:]}_{counts[label]:04d}_{id}.jpg", *examples[i]))
        return rows

    def folders(self, root):
        cub = root / "CUB_200_2011"
        return cub / "images", cub / "segmentations", cub / "waterbird_complete95_forest2water2"

    def prepare(self, root):
        for parent in self.folders(root):
            for name in self.CLASSES:
                (parent / name).mkdir(parents=True)
        (root / "CUB_200_2011" / "parts").mkdir()

    def annotate(self, row, root, scene):
        """Save the mask -> mask, box (x, y, width, height), part locations (15, 3)."""
        mask = soft(scene.mask)
        save(mask, (self.folders(root)[1] / row.file).with_suffix(".png"))
        xs, ys = mask.any(0).nonzero()[0], mask.any(1).nonzero()[0]
        return mask, (xs[0], ys[0], xs[-1] + 1 - xs[0], ys[-1] + 1 - ys[0]), part_locations(scene, mask)

    def finish(self, root, rows, drawn):
        """Write the text files. drawn: (box, part locations) row by row."""
        boxes, points = zip(*drawn)
        numbers = lambda values: " ".join(f"{v:.1f}" for v in values)
        tables = {
            "images": (f"{r.id} {r.file}" for r in rows),
            "image_class_labels": (f"{r.id} {r.label + 1}" for r in rows),
            "train_test_split": (f"{r.id} {int(self.SPLITS[r.split] != 'test')}" for r in rows),
            "classes": (f"{i} {name}" for i, name in enumerate(self.CLASSES, 1)),
            "bounding_boxes": (f"{r.id} {numbers(box)}" for r, box in zip(rows, boxes)),
            "parts/parts": (f"{i} {name}" for i, name in enumerate(PARTS, 1)),
            "parts/part_locs": (f"{r.id} {i} {numbers(xy)} {visible}" for r, table in zip(rows, points)
                                for i, (*xy, visible) in enumerate(table, 1))}
        for name, lines in tables.items():
            (root / "CUB_200_2011" / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))

    def write_metadata(self, root, rows):
        """Waterbirds' table. rows: (id, file, y, split, place) of each composite."""
        shuffled = np.random.default_rng([self.seed, ORDER]).permutation(len(rows))     # order means nothing
        with open(self.folders(root)[2] / "metadata.csv", "w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(("img_id", "img_filename", "y", "split", "place", "place_filename"))
            for id, *row, place in (rows[i] for i in shuffled):
                table.writerow((id, *row, place, f"{PLACES[place][id % 2]}/{id:08d}.jpg"))


@dataclass(frozen=True)
class Waterbirds(CubFolder):
    """The knobs of a miniature Waterbirds, and how to write it.

    The defaults pose the benchmark's problem to a small network; they were chosen on validation (README, The
    miniature).
    """
    train: int = opt(2200, "training examples, half of them of each class")
    val: int = opt(400, "validation examples, balanced over the four groups")
    test: int = opt(800, "test examples, balanced over the four groups")
    size: int = opt(96, "side of a picture in pixels, a multiple of 8")
    agreement: float = opt(0.95, "share of each class's training examples whose place agrees with the class")
    things: tuple = opt((10, 15), "fewest and most things that mark the place, at most 25")
    thing_radius: tuple = opt((0.05, 0.08), "smallest and largest thing, as a share of the side")
    bird: tuple = opt((0.19, 0.24), "smallest and largest bird: half a body, as a share of the side")
    cue: float = opt(1.0, "how much the classes differ in shape and head hue; 0 = not at all")
    coat: float = opt(COAT, "strength of the fine grain that a bird's feathers have and nothing else has, 0..1")
    hue_noise: float = opt(0.03, "standard deviation of head hues within a class; 1 = the full circle")
    seed: int = opt(0, "a scene depends on (seed, split, index) only")

    CLASSES = ("001.Landbird", "002.Waterbird")
    GROUPS = ("landbird/land", "landbird/water", "waterbird/land", "waterbird/water")       # 2 * label + place

    def rows(self):
        """All examples, sorted by id. The sizes of classes and groups are exact, not drawn."""
        examples = []                                                       # (label, place, split, index)
        for split, n in enumerate((self.train, self.val, self.test)):
            rate = self.agreement if self.SPLITS[split] == "train" else .5
            for i in range(n):
                label, rank = i % 2, i // 2
                agrees = rank < round(rate * ((n + 1 - label) // 2))        # times the size of this class
                examples.append((label, label if agrees else 1 - label, split, i))
        return self.number(examples)

    def scene(self, row):
        """The place decides which things there are and nothing else: bird, backdrop and noise ignore it."""
        rng = np.random.default_rng([self.seed, row.split, row.index])
        look, frame = bird_look(rng, row.label, self.cue, self.hue_noise), pose(rng, self.bird, shift=.1)
        return compose(rng, self.size, creature(look), frame, self.coat, partial(
            scatter, kinds=PLACE_KINDS[row.place], count=self.things, radius=self.thing_radius))

    def write(self, row, root):
        """Draw one example, save its three pictures -> box, part locations."""
        scene = self.scene(row)
        images, _, composites = self.folders(root)
        save_jpeg(scene.plain, images / row.file)
        save_jpeg(scene.image, composites / row.file)
        return self.annotate(row, root, scene)[1:]

    def finish(self, root, rows, drawn):
        super().finish(root, rows, drawn)
        self.write_metadata(root, [(r.id, r.file, r.label, r.split, r.place) for r in rows])


# species = three bits: head, breast and wing; tail, bill and legs repeat two of them each, mixed
SPECIES = ("Rusty_Pinefinch", "Rusty_Oakfinch", "Meadow_Bunting", "Moss_Bunting",
           "Surf_Rail", "Harbour_Rail", "Lake_Grebe", "Buoy_Grebe")
HOMES = ("pine", "tree", "grass", "mushroom", "crests", "boat", "ripples", "buoy")   # things of each, four of land
PLUMAGE = {"head_skin": (.02, .58), "breast_skin": (.14, .9), "trim": (.36, .7), "tail_skin": (.08, .5)}     # hues


def species_look(rng, species, cue, hue_noise):
    """One of eight species. No part tells it: each halves the eight, and three of them decide."""
    head, breast, wing = (bool(species & bit) for bit in (4, 2, 1))
    skins = {name: hsv(rng.normal(cued(hues, which, cue), hue_noise), rng.uniform(.6, .9), rng.uniform(.5, .95))
             for (name, hues), which in zip(PLUMAGE.items(), (head, breast, wing, head != breast))}
    bill, legs = breast != wing, head != wing
    draw = lambda low, high, which: rng.uniform(*cued((low, high), which, cue))
    return Look(body=(rng.uniform(1.04, 1.2), rng.uniform(.63, .71)), neck=rng.uniform(.2, .6), face="bill",
                head=rng.uniform(.44, .52), tail="feather", tail_length=rng.uniform(.65, .85),
                tail_lift=rng.uniform(5, 35), legs=2,
                bill=(draw((.45, .55), (.8, .95), bill), draw((.22, .26), (.12, .15), bill), .03),
                leg=draw((.35, .45), (.65, .8), legs), web=draw((0, .1), (.9, 1), legs), pattern="wing",
                **colours(rng) | skins)


@dataclass(frozen=True)
class Cub(CubFolder):
    """Eight species of bird, told apart by the colours of their parts and the shapes of bill and legs.

    Around a bird lie things of one kind. Its species has a home among eight kinds, and 95 % of the birds are at
    home, in training and in the test set, as photographs of a species share a habitat. Waterbird200, rendered
    into the same folder, takes the test birds away: each is cut out under its soft mask and put on another backdrop,
    among things of land or water, half of each species on the one that is not its own (species 1-4 are landbirds).
    """
    train: int = opt(2400, "training examples, as many of each species")
    test: int = opt(800, "test examples, as many of each species; each is drawn once more on another habitat")
    size: int = opt(96, "side of a picture in pixels, a multiple of 8")
    agreement: float = opt(0.95, "share of each species' examples that are at home")
    things: tuple = opt((7, 11), "fewest and most things around a bird, at most 25")
    thing_radius: tuple = opt((0.06, 0.1), "smallest and largest thing, as a share of the side")
    bird: tuple = opt((0.2, 0.24), "smallest and largest bird: half a body, as a share of the side")
    cue: float = opt(1.0, "how much species differ in colours, bill and legs; 0 = not at all")
    coat: float = opt(COAT, "strength of the fine grain that a bird's feathers have and nothing else has, 0..1")
    hue_noise: float = opt(0.03, "standard deviation of a part's hue within a species; 1 = the full circle")
    seed: int = opt(0, "a scene depends on (seed, split, index) only")

    SPLITS = ("train", "test")
    CLASSES = tuple(f"{i:03d}.{name}" for i, name in enumerate(SPECIES, 1))
    GROUPS = CLASSES
    FOLDER = "cub"              # what the cache calls it, whichever of the two benchmarks is asked for

    def group(self, row):
        return row.label

    def rows(self):
        """All examples, sorted by id; place is the species that is at home there. Shares are exact."""
        examples = []
        for split, n in enumerate((self.train, self.test)):
            for i in range(n):
                label, rank = i % 8, i // 8
                home = rank < round(self.agreement * ((n + 7 - label) // 8))
                examples.append((label, label if home else (label + 1 + rank % 7) % 8, split, i))
        return self.number(examples)

    def scene(self, row):
        rng = np.random.default_rng([self.seed, row.split, row.index])
        body, frame = creature(species_look(rng, row.label, self.cue, self.hue_noise)), pose(rng, self.bird, shift=.1)
        return compose(rng, self.size, body, frame, self.coat, partial(
            scatter, kinds=[HOMES[row.place]], count=self.things, radius=self.thing_radius, table=ALL_KINDS))

    def habitat(self, row):
        """0 land, 1 water: where Waterbird200 puts a test bird; every second bird of a species is misplaced."""
        return row.label // 4 ^ row.index // 8 % 2

    def composite(self, row, image, mask):
        """The bird of an image under its soft mask (0..255) on a new backdrop, as Waterbirds was made."""
        rng = np.random.default_rng([self.seed, COMPOSITE, row.split, row.index])
        place = self.habitat(row)
        ground = empty(rng, self.size, partial(scatter, kinds=HOMES[4 * place:4 * place + 4], count=self.things,
                                               radius=self.thing_radius, table=ALL_KINDS))
        alpha = mask[..., None] / 255
        return (alpha * image + (1 - alpha) * ground).round().astype(np.uint8)

    def write(self, row, root):
        """Draw one example, save image and mask, and the composite of a test bird -> box, part locations."""
        scene = self.scene(row)
        images, _, composites = self.folders(root)
        save_jpeg(scene.image, images / row.file)
        mask, *drawn = self.annotate(row, root, scene)
        if self.SPLITS[row.split] == "test":
            save_jpeg(self.composite(row, scene.image, mask), composites / row.file)
        return drawn

    def finish(self, root, rows, drawn):
        """The table of composites holds the test birds only: nobody may evaluate on another."""
        super().finish(root, rows, drawn)
        note(root, self)
        self.write_metadata(root, [(r.id, r.file, r.label // 4, 2, self.habitat(r)) for r in rows if r.split == 1])


class Waterbird200(Cub):
    """The test birds of Cub on habitats: the same knobs, the same folder; the sheet shows the composites."""

    def picture(self, row):
        scene = self.scene(row)
        return self.composite(row, scene.image, soft(scene.mask))


def part_locations(scene, mask):
    """(15, 3) whole numbers x, y, visible; 0 0 0 for a part that is turned away or outside the picture."""
    near, far = ("left", "right") if scene.mirror else ("right", "left")    # facing right shows the right
    named = {name.replace("near", near).replace("far", far): xy for name, xy in scene.parts.items()}
    covered = np.argwhere(mask)[:, ::-1]                                    # (n, 2) x, y
    table = np.zeros((len(PARTS), 3), int)
    for i, xy in ((i, named[name]) for i, name in enumerate(PARTS) if name in named):
        if 0 <= min(xy) and max(xy) < 1:
            # A leg is thinner than two pixels and rounding may miss it; the nearest covered pixel does not.
            distance = ((covered + .5 - xy * len(mask)) ** 2).sum(1)
            table[i] = *covered[distance.argmin()], 1
    return table
