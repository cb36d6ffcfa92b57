"""cub.py: miniatures of Waterbirds, CUB and Waterbird200, in the layout that benchmarks/cub.py reads.

Floor: data. Read scenes.py first: how anything is drawn. Waterbirds' problem: a bird stands on a coloured backdrop that
says nothing. Behind it lie small things: trees and grass (place = land) or waves and boats (place = water). In training
the place agrees with the kind of bird 95 % of the time, elsewhere it is a coin flip. Land- and waterbirds differ in
shape and in the hue of the head: the bird alone decides.
"""
import colorsys
import csv
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.cub import attributes_missing, read_points, region_of
from miniature.objects import PLACE_KINDS, hsv, scatter
from miniature.scenes import (COAT, PRETRAIN, Look, Miniature, Row, bird_look, colours, compose, creature, cued, pose,
                              save, with_knobs)
from settings import new_folder, write_whole

IDS, ORDER, COMPOSITE = PRETRAIN + 1, PRETRAIN + 2, PRETRAIN + 3        # other uses of the seed
COMPOSITES = "waterbird_complete95_forest2water2"                       # Waterbirds' folder inside CUB's
PLACE_FILES = (("/b/bamboo_forest", "/f/forest/broadleaf"), ("/o/ocean", "/l/lake/natural"))
PARTS = ("back", "beak", "belly", "breast", "crown", "forehead", "left eye", "left leg", "left wing", "nape",
         "right eye", "right leg", "right wing", "tail", "throat")          # in CUB's order


class CubFolder(Miniature):
    """Base: a folder like CUB's, and one like Waterbirds' inside it. look(rng, label) is what a bird looks like."""
    TOPS = tuple(f"CUB_200_2011/{folder}" for folder in ("images", "segmentations", COMPOSITES))
    COLOURED = {}                   # {group of CUB's attributes: the colour of a Look that it is about}

    def subject(self, rng, label):
        return creature(self.look(rng, label)), pose(rng, self.bird, shift=.1)

    def rows(self):
        """All examples with file names as in CUB, sorted by id. Ids do not tell splits, only classes."""
        examples = self.examples()
        order = np.random.default_rng([self.seed, IDS]).permutation(len(examples))
        rows, counts = [], [0] * len(self.CLASSES)
        for id, i in enumerate(sorted(order, key=lambda i: examples[i][0]), 1):
            label = examples[i][0]
            counts[label] += 1
            name = self.CLASSES[label]
            rows.append(Row(id, f"{name}/{name[4:]}_{counts[label]:04d}_{id}.jpg", *examples[i]))
        return rows

    def write(self, row, root):
        """Draw one example and save its pictures -> box (x, y, width, height), part locations (15, 3)."""
        scene = self.scene(row)
        mask, (images, masks, composites) = soft(scene.mask), (root / top / row.file for top in self.TOPS)
        image, composite = self.pictures(row, scene, mask)
        save(image, images)
        save(mask, masks.with_suffix(".png"))
        if composite is not None:
            save(composite, composites)
        xs, ys = mask.any(0).nonzero()[0], mask.any(1).nonzero()[0]
        return (xs[0], ys[0], xs[-1] + 1 - xs[0], ys[-1] + 1 - ys[0]), part_locations(scene, mask)

    def finish(self, root, rows, drawn):
        """Write the text files of CUB, and Waterbirds' table of the composites."""
        numbers = lambda values: " ".join(f"{v:.1f}" for v in values)
        tables = {
            "images": (f"{r.id} {r.file}" for r in rows),
            "image_class_labels": (f"{r.id} {r.label + 1}" for r in rows),
            "train_test_split": (f"{r.id} {int(self.SPLITS[r.split] != 'test')}" for r in rows),
            "classes": (f"{i} {name}" for i, name in enumerate(self.CLASSES, 1)),
            "bounding_boxes": (f"{r.id} {numbers(box)}" for r, (box, _) in zip(rows, drawn)),
            "parts/parts": (f"{i} {name}" for i, name in enumerate(PARTS, 1)),
            "parts/part_locs": (f"{r.id} {i} {numbers(xy)} {visible}" for r, (_, parts) in zip(rows, drawn)
                                for i, (*xy, visible) in enumerate(parts, 1))}
        cub = root / "CUB_200_2011"
        (cub / "parts").mkdir()
        for name, lines in tables.items():
            (cub / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
        (cub / "attributes").mkdir()
        for name, text in self.attributes(rows, [parts[:, 2] for _, parts in drawn]).items():
            (root / name).write_text(text)
        lines = self.metadata(rows)
        with open(cub / COMPOSITES / "metadata.csv", "w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(("img_id", "img_filename", "y", "split", "place", "place_filename"))
            for i in np.random.default_rng([self.seed, ORDER]).permutation(len(lines)):     # order means nothing
                id, *_, place = lines[i]
                table.writerow((*lines[i], f"{PLACE_FILES[place][id % 2]}/{id:08d}.jpg"))


    def complete(self, root):
        """A folder that was drawn before there were attributes gets them; no picture is drawn again."""
        cub = root / "CUB_200_2011"
        if attributes_missing(cub) and (table := cub / "parts" / "part_locs.txt").is_file():
            points, rows = read_points(table), self.rows()
            names, *others = self.attributes(rows, [points[str(row.id)][:, 2] for row in rows]).items()
            write_whole(root / names[0], lambda file: file.write_text(names[1]))
            with new_folder(cub / "attributes") as folder:
                for name, text in others:
                    (folder / Path(name).name).write_text(text)

    def attributes(self, rows, visible):
        """Colours of a bird's parts in CUB's layout -> {file: its text}. visible: of each row (15,), 1 = it is shown.

        What the random numbers of a scene decide first is the look of its bird, so that nothing need be drawn.
        """
        groups, lines = list(self.COLOURED), []
        for row, shown in zip(rows, visible):
            look = self.look(np.random.default_rng([self.seed, self.USE + row.split, row.index]), row.label)
            for first, group in enumerate(groups):
                colour = colour_name(getattr(look, self.COLOURED[group]))
                certain = 4 if any(shown[i - 1] for i in region_of(group)) else 1
                lines += [f"{row.id} {first * len(COLOURS) + i} {int(name == colour)} {certain} 0"
                          for i, name in enumerate(COLOURS, 1)]
        names = [f"{group}::{colour}" for group in groups for colour in COLOURS]
        text = lambda lines: "".join(f"{line}\n" for line in lines)
        return {"attributes.txt": text(f"{i} {name}" for i, name in enumerate(names, 1)),         # beside it, as in CUB
                "CUB_200_2011/attributes/certainties.txt": text(f"{i} {name}" for i, name in enumerate(CERTAIN, 1)),
                "CUB_200_2011/attributes/image_attribute_labels.txt": text(lines)}


CERTAIN = ("not visible", "guessing", "probably", "definitely")
# the fifteen colours of CUB's attributes
COLOURS = ("blue", "brown", "iridescent", "purple", "rufous", "grey", "yellow", "olive", "green", "pink", "orange",
           "black", "white", "red", "buff")
HUES = ((.06, "red"), (.11, "orange"), (.2, "yellow"), (.42, "green"), (.64, "blue"), (.8, "purple"), (.95, "pink"),
        (1, "red"))             # where each ends on the circle of hues, whatever its brightness


def colour_name(rgb):
    """What CUB's annotators might call a drawn colour: three whole numbers -> one of COLOURS."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(x / 255 for x in rgb))
    if saturation < .12:
        return "black" if value < .2 else "white" if value > .85 else "grey"
    return next(name for end, name in HUES if hue <= end)


def soft(mask):
    """Covered shares 0..1 -> uint8 in six levels, like the agreement of five annotators."""
    return np.rint(mask * 5).astype(np.uint8) * 51


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


class Waterbirds(with_knobs(
        CubFolder, train=2200, val=400, test=800, size=96, agreement=.95, things=(20, 25), thing_radius=(.07, .11),
        bird=(.19, .24), cue=.4, coat=COAT, hue_noise=.04, seed=0)):
    """Landbirds and waterbirds, with things of land or water around them.

    The defaults pose the benchmark's problem to a small network; they were chosen on validation
    (docs/miniature.md). Validation and test set are balanced over the four groups.
    """
    SPLITS, EVEN = ("train", "val", "test"), ("val", "test")
    CLASSES, PLACES = ("001.Landbird", "002.Waterbird"), PLACE_KINDS
    GROUPS = ("landbird/land", "landbird/water", "waterbird/land", "waterbird/water")

    COLOURED = {"has_bill_color": "horn", "has_crown_color": "head_skin", "has_breast_color": "skin",
                "has_wing_color": "trim", "has_leg_color": "horn"}

    def group(self, row):
        return 2 * row.label + row.place

    def look(self, rng, label):
        return bird_look(rng, label, self.cue, self.hue_noise)

    def pictures(self, row, scene, mask):
        """What lies in CUB's folder, and in Waterbirds': the things come with the composite."""
        return scene.plain, scene.image

    def metadata(self, rows):
        """[(id, file, y, split, place)] of the composites."""
        return [(r.id, r.file, r.label, r.split, r.place) for r in rows]


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


class Cub(with_knobs(
        CubFolder, train=2400, test=800, size=96, agreement=.95, things=(16, 22), thing_radius=(.06, .1),
        bird=(.2, .24), cue=.6, coat=COAT, hue_noise=.03, seed=0)):
    """Eight species of bird, told apart by the colours of their parts and the shapes of bill and legs.

    Around a bird lie things of one kind. Its species has a home among eight kinds, and 95 % of the birds are at
    home, in training and in the test set, as photographs of a species share a habitat. Waterbird200, rendered
    into the same folder, takes the test birds away: each is cut out under its soft mask and put on another backdrop,
    among things of land or water, half of each species on the one that is not its own (species 1-4 are landbirds).
    """
    CLASSES = GROUPS = tuple(f"{i:03d}.{name}" for i, name in enumerate(SPECIES, 1))
    PLACES = tuple((kind,) for kind in HOMES)       # place = the species that is at home there
    FOLDER = "cub"                                  # whichever of the two benchmarks is asked for
    COLOURED = {"has_bill_color": "horn", "has_crown_color": "head_skin", "has_breast_color": "breast_skin",
                "has_back_color": "skin", "has_wing_color": "trim", "has_upper_tail_color": "tail_skin",
                "has_leg_color": "horn"}

    def look(self, rng, label):
        return species_look(rng, label, self.cue, self.hue_noise)

    def habitat(self, row):
        """0 land, 1 water: where Waterbird200 puts a test bird; every second bird of a species is misplaced."""
        return row.label // 4 ^ row.index // 8 % 2

    def composite(self, row, image, mask):
        """The bird of an image under its soft mask (0..255) on a new backdrop, as Waterbirds was made."""
        rng = np.random.default_rng([self.seed, COMPOSITE, row.split, row.index])
        place = self.habitat(row)
        ground = compose(rng, self.size, draw_things=partial(
            scatter, kinds=HOMES[4 * place:4 * place + 4], count=self.things, radius=self.thing_radius)).image
        alpha = mask[..., None] / 255
        return (alpha * image + (1 - alpha) * ground).round().astype(np.uint8)

    def pictures(self, row, scene, mask):
        """What lies in CUB's folder, and in Waterbirds': test birds only, nobody may evaluate on another."""
        return scene.image, self.composite(row, scene.image, mask) if self.SPLITS[row.split] == "test" else None

    def metadata(self, rows):
        return [(r.id, r.file, r.label // 4, 2, self.habitat(r)) for r in rows if self.SPLITS[r.split] == "test"]

    def finish(self, root, rows, drawn):
        super().finish(root, rows, drawn)
        Miniature.finish(self, root, rows, drawn)


class Waterbird200(Cub):
    """The test birds of Cub on habitats: the same knobs, the same folder; the sheet shows the composites."""

    def picture(self, row):
        scene = self.scene(row)
        return self.composite(row, scene.image, soft(scene.mask))
