"""imagenet.py: miniatures of ImageNet and ImageNet-9, in the layouts that benchmarks/imagenet.py reads.

Floor: data. Read scenes.py first, and objects.py for what the objects look like.
"""
import numpy as np

from benchmarks.imagenet import IN9, IN9_VARIANTS
from miniature.objects import DARK, Shape, draw_thing, hsv, shade
from miniature.scenes import COAT, Miniature, Row, bird_look, creature, pet_look, pose, save, with_knobs
from settings import UsageError

GROUPS9 = tuple(IN9)
DRAWN = (       # for each group of ImageNet-9: (wnid, ImageNet's class index, what is drawn), and the thing around them
    ((("n02085620", 151, "chihuahua"), ("n02106662", 235, "shepherd")), "fence"),
    ((("n01530575", 10, "finch"), ("n01855672", 99, "goose")), "tree"),
    ((("n03770679", 656, "minivan"), ("n02835271", 444, "tandem")), "sign"),
    ((("n01664065", 33, "turtle"), ("n01728572", 52, "snake")), "cactus"),
    ((("n02129604", 292, "tiger"), ("n02132136", 294, "bear")), "rock"),
    ((("n02165456", 301, "ladybug"), ("n02279972", 323, "monarch")), "flower"),
    ((("n02676566", 402, "guitar"), ("n03249569", 541, "drum")), "lamp"),
    ((("n02480855", 366, "gorilla"), ("n02494079", 382, "monkey")), "palm"),
    ((("n01443537", 1, "goldfish"), ("n01484850", 2, "shark")), "coral"))
# the first wnid of each group, then the second of each: label % 9 is the group
CLASSES9 = tuple(wnids[i] for i in range(2) for wnids, _ in DRAWN)
FUR = {             # kind: 0 built like a cat, 1 like a dog; ranges of hue, saturation, value; what else differs
    "chihuahua": (1, (.08, .12), (.25, .4), (.8, .95), dict(pattern="plain")),
    "shepherd": (1, (.05, .08), (.5, .7), (.4, .55), dict(pattern="wing", trim=DARK, leg=.75, tail_lift=-5)),
    "tiger": (0, (.05, .08), (.8, .95), (.85, 1), dict(pattern="stripes", trim=DARK, body=(1.35, .7), leg=.45)),
    "bear": (0, (.04, .07), (.45, .65), (.3, .42), dict(pattern="plain", body=(1.25, .85), leg=.35, tail="short"))}


def foreground(rng, kind, hue_noise):
    """A creature or object of ImageNet -> (shapes, parts) for compose. hue_noise: deviation from its kind's hue."""
    if kind in ("finch", "goose"):
        return creature(bird_look(rng, kind == "goose", hue_noise=hue_noise))
    shift = rng.normal(0, hue_noise)
    if kind in FUR:
        build, hue, *ranges, more = FUR[kind]
        skin = hsv(shift + rng.uniform(*hue), *(rng.uniform(*r) for r in ranges))
        look = pet_look(rng, build, 1)._replace(skin=skin, head_skin=skin, trim=shade(skin, .75), horn=shade(skin, .8))
        return creature(look._replace(**more))
    size = 1.5 * rng.uniform(.93, 1.07, 2)              # a creature is about as large
    return [Shape(shape.points * size, shape.colour) for shape in draw_thing(rng, kind, shift)], {}


KNOBS9 = dict(size=96, wnids=1, agreement=.95, things=(7, 11), thing_radius=(.06, .1), object=(.19, .23), coat=COAT,
              hue_noise=.15, seed=0)


class Groups9(Miniature):
    """Base: an object of one of ImageNet-9's nine groups among things of one kind, each group's own in 95 %."""
    PLACES = tuple((thing,) for _, thing in DRAWN)

    def __post_init__(self):
        super().__post_init__()
        for name in self.SPLITS:
            if getattr(self, name) < (least := 18 * self.wnids):        # ImageNet-9 needs another picture of each group
                raise UsageError(f"--{name} must be at least {least}, two of each class, not {getattr(self, name)}")

    @property
    def CLASSES(self):
        return CLASSES9[:9 * self.wnids]

    def rows(self):
        rows = [Row(index + 1, "", label, place, split, index) for label, place, split, index in self.examples()]
        return [row._replace(file=self.name(row, self.CLASSES[row.label][0])) for row in rows]

    def subject(self, rng, label):
        """Hues of a class spread over the circle: shapes tell. Its size is a third of its length."""
        return foreground(rng, self.CLASSES[label][2], self.hue_noise), pose(rng, self.object, shift=.08)

    def finish(self, root, rows, drawn):
        super().finish(root, rows, drawn, wnids={wnid: index for wnid, index, _ in self.CLASSES})


class ImageNet(with_knobs(Groups9, **KNOBS9, train=4500, val=450)):
    """Nine of ImageNet's 1000 classes, one of each group of ImageNet-9 (or eighteen), under their real wnids.

    Around an object lie things of one kind: fences around dogs, trees around birds and so on. In training and
    validation they are those of the object's group in 95 %; ImageNet-9 tells whether a model relies on them.
    miniature.json says which of the 1000 classes each wnid is, for there are too few folders to count.
    """
    SPLITS = ("train", "val")
    TOPS = ("imagenet", "segmentations")

    @property
    def GROUPS(self):
        return tuple(f"{wnid} {kind}" for wnid, _, kind in self.CLASSES)

    def name(self, row, wnid):
        stem = f"ILSVRC2012_val_{row.id:08d}" if row.split else f"{wnid}_{row.id}"
        return f"{self.SPLITS[row.split]}/{wnid}/{stem}.JPEG"


MIXED = ("mixed_same", "mixed_rand", "mixed_next")


class ImageNet9(with_knobs(Groups9, **KNOBS9, test=450)):
    """The Backgrounds Challenge for models of the miniature ImageNet: new pictures of the same kind, and variants.

    only_bg_b: the object's box is black; only_bg_t: it is tiled with the largest strip beside it; no_fg: the object is
    black; only_fg: all else is. mixed_*: the object on the only_bg_t of another picture, of the same, a random or
    the next group. Pictures have the model's size, for nothing resizes them.
    """
    SPLITS = ("test",)
    GROUPS = GROUPS9
    USE = 20

    def group(self, row):
        return row.label % 9

    def name(self, row, wnid):
        return f"{wnid}_{row.id:05d}"

    def variants(self, row, rows):
        """-> {variant: (stem, picture)}, mask (S, S) bool."""
        scene = self.scene(row)
        image, mask = scene.image, scene.mask >= .5
        black, box = np.uint8(0), np.zeros_like(mask)
        box[box_of(mask)] = True
        over = lambda where, ground: np.where(where[..., None], image, ground)      # the image there, else the ground
        pictures = {"original": image, "only_fg": over(mask, black), "no_fg": over(~mask, black),
                    "only_bg_b": over(~box, black), "only_bg_t": without(image, mask)}
        named = {name: (row.file, picture) for name, picture in pictures.items()}
        rng, group = np.random.default_rng([self.seed, self.USE + 1, row.index]), self.group(row)
        for name, wanted in zip(MIXED, (group, rng.integers(9), (group + 1) % 9)):
            others = [r for r in rows if self.group(r) == wanted and r != row]
            other = others[rng.integers(len(others))]
            there = self.scene(other)
            named[name] = f"fg_{row.file}_bg_{other.file}", over(mask, without(there.image, there.mask >= .5))
        return named, mask

    def folders(self, rows):
        return [f"bg_challenge/{variant}/val/{group}" for variant in (*IN9_VARIANTS, "fg_mask") for group in GROUPS9]

    def write(self, row, root):
        named, mask = self.variants(row, self.rows())
        folder = lambda variant: root / "bg_challenge" / variant / "val" / self.GROUPS[self.group(row)]
        for variant, (stem, picture) in named.items():
            save(picture, folder(variant) / f"{stem}.JPEG")
        np.save(folder("fg_mask") / f"{row.file}.npy", mask.astype(np.uint8))

    def sheet(self):
        """(8 S, 9 S, 3) uint8: a line for each variant, a column for each group."""
        rows = self.rows()
        columns = [self.variants(row, rows)[0] for row in rows[:9]]
        return np.concatenate([np.concatenate([named[v][1] for named in columns], 1) for v in IN9_VARIANTS])


def box_of(mask):
    """Slices (rows, columns) of the smallest box around a mask's pixels."""
    ys, xs = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    return slice(ys[0], ys[-1] + 1), slice(xs[0], xs[-1] + 1)


def without(image, mask):
    """The image with the box around the mask tiled with the largest strip above, below or beside it."""
    ys, xs = box_of(mask)
    strips = image[:ys.start], image[ys.stop:], image[:, :xs.start], image[:, xs.stop:]
    strip, hole, result = max(strips, key=lambda s: s.size), image[ys, xs], image.copy()
    times = [-(-a // b) for a, b in zip(hole.shape[:2], strip.shape[:2])]           # rounded up
    result[ys, xs] = np.tile(strip, (*times, 1))[:len(hole), :hole.shape[1]]
    return result
