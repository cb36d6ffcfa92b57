"""transforms.py: what happens to an image between its file and the model, in training and in evaluation.

    view = View(image, mask, points)
    FINE_GRAINED.train(view, 518, np.random.default_rng([seed, epoch, number]))
    tensor = to_tensor(view.image, FINE_GRAINED.normalisation)

Each benchmark names one Pipeline. All randomness comes from the generator that is passed in.
Coordinates of keypoints and boxes are x (column), y (row) in pixels.
Floor: data. Nothing needs to be read before.
"""
from typing import Callable, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

BILINEAR, BICUBIC, NEAREST = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.NEAREST

# channel means and deviations of [0, 1] pixels
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CHEST = ((0.48865,) * 3, (0.24621,) * 3)                   # the published code's, of the SIIM-ACR training images

# (red, green, blue) of blackbodies, 3000 K to 15000 K in steps of 500 K: Zini et al., PlanckianJitter (MIT)
PLANCKIAN = np.array([
    (.6743, .4029, .0013), (.6281, .4241, .1665), (.5919, .4372, .2513), (.5623, .4457, .3154), (.5376, .4515, .3672),
    (.5163, .4555, .4103), (.4979, .4584, .4468), (.4816, .4604, .4782), (.4672, .4619, .5053), (.4542, .4630, .5289),
    (.4426, .4638, .5497), (.4320, .4644, .5681), (.4223, .4648, .5844), (.4135, .4651, .5990), (.4054, .4653, .6121),
    (.3980, .4654, .6239), (.3911, .4655, .6346), (.3847, .4656, .6444), (.3787, .4656, .6532), (.3732, .4656, .6613),
    (.3680, .4655, .6688), (.3632, .4655, .6756), (.3586, .4655, .6820), (.3544, .4654, .6878), (.3503, .4653, .6933)])


# ---------------------------------------------------------------- an image and its annotations
class View:
    """An image on its way to the model, with what is annotated on it. Each step changes all of them alike.

    image: PIL RGB; mask: PIL L, 0 = background, or None; points (P, 3): x, y, visible, or None; box (4,): x, y, width,
    height, or None. Coordinates are continuous: 0 is the left edge of the first pixel, the width the right edge of
    the last.
    """

    def __init__(self, image, mask=None, points=None, box=None):
        self.image, self.mask = image, mask
        self.points, self.box = (None if x is None else np.array(x, dtype=np.float64) for x in (points, box))  # copies

    def each(self, step, of_mask=None):
        """Change image and mask by a step, or the mask by one of its own."""
        self.image = step(self.image)
        self.mask = self.mask and (of_mask or step)(self.mask)

    def repaint(self, change):
        """Change the image alone: what moves nothing."""
        self.image = change(self.image)

    def move(self, linear, offset=0):
        """What is at p goes to linear p + offset: points, and the box to the smallest one around its corners."""
        if self.points is not None:
            self.points[:, :2] = self.points[:, :2] @ linear.T + offset
        if self.box is not None:
            corners = self.box[:2] + self.box[2:] * np.array([[0, 0], [1, 0], [0, 1], [1, 1]])
            corners = corners @ linear.T + offset
            self.box = np.concatenate([corners.min(0), np.ptp(corners, axis=0)])

    def stretch(self, new, resample=BILINEAR):
        """To `new` = (width, height), with antialiasing; the mask nearest."""
        self.move(np.diag(np.divide(new, self.image.size)))
        self.each(lambda image: image.resize(new, resample), lambda mask: mask.resize(new, NEAREST))

    def resize(self, size, resample=BILINEAR):
        """Shorter side to `size`."""
        old = self.image.size
        self.stretch(tuple(size if n == min(old) else int(size * n / min(old)) for n in old), resample)

    def flip(self):
        """Mirror left to right."""
        self.each(lambda x: x.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        self.move(np.diag([-1, 1]), (self.image.width, 0))

    def recolour(self, illuminant):
        """Planckian jitter: red times r/g and blue times b/g, clipped, cut to whole grey levels."""
        levels = np.divide(illuminant, illuminant[1])[:, None] * np.arange(256)            # of each channel: (3, 256)
        self.repaint(lambda image: image.point(np.minimum(levels, 255).astype(np.uint8).ravel().tolist()))

    def warp(self, linear, offset, resample=NEAREST, fill=(0, 0, 0)):
        """Move what is at p to linear p + offset, (2, 2) and (2,); `fill` and no mask where nothing arrives."""
        back = np.linalg.inv(linear)
        inverse = tuple(np.column_stack([back, -back @ offset]).ravel())      # PIL asks where pixels come from
        where = (self.image.size, Image.Transform.AFFINE, inverse)
        self.each(lambda image: image.transform(*where, resample, fillcolor=fill),
                  lambda mask: mask.transform(*where, NEAREST))
        self.move(linear, offset)

    def affine(self, angle, shift, scale, **how):
        """Turn clockwise by `angle` degrees and scale about the centre, then shift by (x, y) pixels."""
        turn, centre = np.deg2rad(angle), np.array(self.image.size) / 2
        linear = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        self.warp(linear, centre + shift - linear @ centre, **how)

    def crop(self, left, top, width, height=None):
        """Cut a rectangle, a square if no height is given. Points outside move onto its edge and become invisible.

        The box's corner too, but not its width and height: the published keypoint evaluation divides by them.
        """
        corner, size = np.array([left, top]), (width, height or width)
        self.each(lambda x: x.crop((*corner, *corner + size)))
        if self.points is not None:
            at = self.points[:, :2] - corner
            self.points[:, 2] *= ((at >= 0) & (at <= size)).all(1)
            self.points[:, :2] = at.clip(0, size)
        if self.box is not None:
            self.box[:2] = (self.box[:2] - corner).clip(0, size)


def window(view, size):
    """What a square view of `size` shows of its picture: view.box, which began as the whole picture (0, 0, w, h), tells.

    -> left, top, right, bottom as shares of the picture's sides. Crops are central.
    """
    span = size / view.box[2:]
    return *(1 - span) / 2, *(1 + span) / 2


# ---------------------------------------------------------------- birds, cats and dogs
def augment(view, size, rng):
    """The published "fine-grained" training pipeline (cub_original), in its order."""
    view.resize(size)
    if rng.random() < 0.5:
        view.flip()
    if rng.random() < 0.8:
        view.recolour(PLANCKIAN[rng.integers(len(PLANCKIAN))])
    shift = np.round(rng.uniform(-0.2, 0.2, 2) * view.image.size)
    view.affine(rng.uniform(-90, 90), shift, rng.uniform(0.8, 1.2))
    width, height = view.image.size
    view.crop(int(rng.integers(width - size + 1)), int(rng.integers(height - size + 1)), size)


def centre(view, size, shorter=None, resample=BILINEAR):
    """The evaluation pipeline: shorter side to `shorter` (default: size), centre crop."""
    view.resize(shorter or size, resample)
    view.crop(*(round((n - size) / 2) for n in view.image.size), size)


# ---------------------------------------------------------------- ImageNet
def augment_imagenet(view, size, rng):
    """timm's training pipeline: random resized crop, flip, RandAugment rand-m6-mstd0.5."""
    view.crop(*random_box(view.image.size, rng))
    view.stretch((size, size), BICUBIC)
    if rng.random() < 0.5:
        view.flip()
    rand_augment(view, rng)


def random_box(size, rng):
    """(left, top, width, height): 8 to 100 % of the area at 3/4 to 4/3; after ten misses the largest, centred."""
    width, height = size
    for _ in range(10):
        area, ratio = rng.uniform(0.08, 1) * width * height, np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


FILL = (124, 116, 104)                                     # ImageNet's mean, where a warp brings nothing


def bring(view, linear, offset=(0, 0)):
    """A warp as PIL and timm write it: what goes to p comes from linear p + offset."""
    back = np.linalg.inv(np.array(linear, dtype=float))
    view.warp(back, -back @ offset, BICUBIC, FILL)


def levels(change):
    """change(level, amount) -> level, of each channel by itself, as an operation."""
    return lambda view, a: view.repaint(lambda image: image.point([change(v, a) for v in range(256)] * 3))


def enhance(kind):
    """An operation of ImageEnhance with its amount at a magnitude: a factor, 1 changes nothing."""
    return lambda view, a: view.repaint(lambda image: kind(image).enhance(a)), lambda m: 0.1 + 0.18 * m, False


# Name: (what it does to a view with an amount, amount at magnitude m in [0, 10], whether its sign is drawn).
# "Non-increasing" set: Posterize and Solarize do more at a lower magnitude, factors cross 1 at m = 5.
OPERATIONS = {
    "AutoContrast": (lambda view, a: view.repaint(ImageOps.autocontrast), lambda m: None, False),
    "Equalize": (lambda view, a: view.repaint(ImageOps.equalize), lambda m: None, False),
    "Invert": (levels(lambda v, a: 255 - v), lambda m: None, False),
    "Rotate": (lambda view, a: view.affine(-a, (0, 0), 1, resample=BICUBIC, fill=FILL), lambda m: 3 * m, True),
    "Posterize": (levels(lambda v, bits: v & 256 - 2 ** (8 - bits)), lambda m: int(0.4 * m), False),
    "Solarize": (levels(lambda v, a: v if v < a else 255 - v), lambda m: int(25.6 * m), False),
    "SolarizeAdd": (levels(lambda v, a: min(255, v + a) if v < 128 else v), lambda m: int(11 * m), False),
    "Color": enhance(ImageEnhance.Color),
    "Contrast": enhance(ImageEnhance.Contrast),
    "Brightness": enhance(ImageEnhance.Brightness),
    "Sharpness": enhance(ImageEnhance.Sharpness),
    "ShearX": (lambda view, a: bring(view, ((1, a), (0, 1))), lambda m: 0.03 * m, True),
    "ShearY": (lambda view, a: bring(view, ((1, 0), (a, 1))), lambda m: 0.03 * m, True),
    "TranslateXRel": (lambda view, a: bring(view, np.eye(2), (a * view.image.width, 0)), lambda m: 0.045 * m, True),
    "TranslateYRel": (lambda view, a: bring(view, np.eye(2), (0, a * view.image.height)), lambda m: 0.045 * m, True)}


def rand_augment(view, rng, magnitude=6.0, deviation=0.5):
    """Two operations drawn with replacement, each applied with probability 1/2 at magnitude ~ N(6, 0.5) in [0, 10]."""
    for name in rng.choice(list(OPERATIONS), 2):
        operate, amount, signed = OPERATIONS[name]
        if rng.random() < 0.5:
            value = amount(float(np.clip(rng.normal(magnitude, deviation), 0, 10)))
            operate(view, -value if signed and rng.random() < 0.5 else value)


def centre_imagenet(view, size):
    """Shorter side to 256/224 of the size, bicubic, centre crop."""
    centre(view, size, round(size * 256 / 224), BICUBIC)


def unchanged(view, size):
    """ImageNet-9: no resize, no crop; the images have the model's size."""
    if view.image.size != (size, size):
        raise ValueError(f"it is {view.image.width} x {view.image.height} pixels, not {size} x {size}, and this "
                         "benchmark is not resized")


# ---------------------------------------------------------------- chest radiographs
def augment_chest(view, size, rng):
    """The published SIIM-ACR pipeline: the whole image as a square, flipped half of the time."""
    squash(view, size)
    if rng.random() < 0.5:
        view.flip()


def squash(view, size):
    view.stretch((size, size))


# ---------------------------------------------------------------- together
class Pipeline(NamedTuple):
    """How a benchmark's images reach the model; checkpoints carry its name."""
    name: str
    train: Callable              # (view, size, numpy generator); None for a benchmark that is only evaluated
    evaluate: Callable           # (view, size)
    normalisation: tuple = IMAGENET
    crops_first: bool = False    # training enlarges a small part of the picture: it needs all of its pixels


FINE_GRAINED = Pipeline("fine-grained", augment, centre)
PHOTOGRAPHS = Pipeline("photographs", augment_imagenet, centre_imagenet, crops_first=True)
AS_THEY_ARE = Pipeline("as they are", None, unchanged)
RADIOGRAPHS = Pipeline("radiographs", augment_chest, squash, CHEST)
PIPELINES = {pipeline.name: pipeline for pipeline in (FINE_GRAINED, PHOTOGRAPHS, AS_THEY_ARE, RADIOGRAPHS)}


def to_tensor(image, normalisation=IMAGENET):
    """PIL RGB -> normalised float tensor (3, height, width)."""
    mean, std = (np.array(x, dtype=np.float32)[:, None, None] for x in normalisation)
    pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")
    pixels /= 255                                        # in place: five times as fast as a new array for each
    pixels -= mean
    pixels /= std
    return torch.from_numpy(pixels)


UNIT = ((0, 0, 0), (1, 1, 1))                              # the normalisation that leaves pixels in [0, 1]


def normalised(images, normalisation):
    """Pixels in [0, 1] (B, 3, height, width) -> those of to_tensor with a normalisation: the same bits."""
    mean, std = (torch.tensor(x, dtype=torch.float32)[:, None, None] for x in normalisation)
    return (images - mean) / std
