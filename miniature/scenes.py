"""scenes.py: pictures drawn with polygons, each with its exact mask: a creature among things on a backdrop.

Floor: data. Every miniature and the pretraining of their backbone (pretrain.py) draw from here.
Creatures have a coat, a fine grain that nothing else has.

Letters: S side of a picture in pixels. Local coordinates: x to the right (creatures face right), y down.
Mask: 1 = creature, 0 = anything else, between = the covered share of an edge pixel.
"""
import colorsys
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from settings import UsageError, write_json

SUPERSAMPLE = 2         # scenes are drawn twice as large and box-filtered: soft edges, soft masks
PIXEL_NOISE = 0.02      # standard deviation on a 0..1 scale
COAT, COAT_CELLS = 0.8, 48      # strength of the grain of feathers and fur; its cells across the picture
PRETRAIN = 3            # a use of the seed of its own: no benchmark draws the same scene


# ---------------------------------------------------------------- shapes
class Shape(NamedTuple):
    points: np.ndarray      # (n, 2) corners of a filled polygon, local coordinates
    colour: tuple           # three whole numbers, 0..255


class Frame(NamedTuple):
    """Where local coordinates lie in the picture; lengths are shares of its side."""
    centre: tuple           # (x, y)
    scale: float            # of the local unit
    mirror: bool            # True: faces left
    turn: float = 0.0       # radians

    def place(self, points):
        """Local (n, 2) -> picture (n, 2), 0..1 inside."""
        c, s = np.cos(self.turn), np.sin(self.turn)
        flip = -1 if self.mirror else 1
        return np.asarray(points) @ (self.scale * np.array([(flip * c, flip * s), (-s, c)])) + self.centre


def paint(canvas, shapes, frame, colour=None):
    """Draw shapes on a square PIL image, in order. A mask is the same polygons, all in one colour."""
    draw = ImageDraw.Draw(canvas)
    for shape in shapes:
        corners = frame.place(shape.points) * canvas.width
        draw.polygon(corners.ravel().tolist(), shape.colour if colour is None else colour)


def hsv(hue, saturation, value):
    """Hue is a circle (1.04 = 0.04); saturation and value 0..1 -> three whole numbers 0..255."""
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue % 1, saturation, value))


def shade(colour, factor):
    return tuple(min(255, round(c * factor)) for c in colour)


def poly(*points):
    return np.array(points, float)


def box(x0, y0, x1, y1):
    return poly((x0, y0), (x1, y0), (x1, y1), (x0, y1))


def bar(a, b, width):
    """A straight line from a to b as a polygon (4, 2)."""
    a, b = np.array(a), np.array(b)
    across = np.array([a[1] - b[1], b[0] - a[0]]) * (width / 2 / np.hypot(*(b - a)))
    return poly(a - across, b - across, b + across, a + across)


def wavy(y, half):
    """A wavy line of the given half length around height y, as a polygon."""
    x = np.linspace(-half, half, 13)
    line = np.stack([x, y + .13 * np.sin(9 * x)], 1)
    return np.concatenate([line - (0, .06), line[::-1] + (0, .06)])


def ellipse(x, y, rx, ry, start=0, stop=360, n=24):
    """Points (n, 2); with angles, in degrees clockwise from the right, the segment between them."""
    angle = np.radians(np.linspace(start, stop, n))
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1)


# ---------------------------------------------------------------- things that stand for a place
BROWN, WHITE = (100, 66, 38), (243, 246, 250)
# kind: ranges of hue, saturation, value; polygons in radius 1 with a shade of it or their own colour
KINDS = {
    "pine": ((.27, .45), (.5, .9), (.3, .7), [
        (BROWN, box(-.13, .6, .13, 1)), (.8, poly((-.75, .75), (.75, .75), (0, -.1))),
        (.95, poly((-.6, .3), (.6, .3), (0, -.5))), (1.1, poly((-.42, -.15), (.42, -.15), (0, -1)))]),
    "tree": ((.15, .42), (.5, .9), (.3, .75), [
        (BROWN, box(-.13, .3, .13, 1)), (1, ellipse(-.3, .05, .45, .4)), (1, ellipse(.3, .05, .45, .4)),
        (1, ellipse(0, -.35, .62, .58)), (1.25, ellipse(-.15, -.5, .3, .26))]),
    "grass": ((.15, .38), (.6, .9), (.4, .8), [
        (.75 + .05 * (5 * i % 7), poly((x - .09, .7), (x + .09, .7), (2.1 * x, -.2 - .25 * (3 * i % 4))))
        for i, x in enumerate(np.linspace(-.4, .4, 7))]),
    "crests": ((.52, .66), (.6, .9), (.45, .85), [
        (tint, ellipse(x, .25, r, 1.15 * r, 180, 360))
        for x in (-.66, 0, .66) for r, tint in ((.4, WHITE), (.29, 1))]),
    "boat": ((0, 1), (.05, .2), (.85, 1), [
        (.85, poly((-.05, -1), (-.05, .35), (-.65, .35))), (1, poly((.05, -.85), (.05, .35), (.6, .35))),
        (BROWN, box(-.03, -1, .03, .5)),
        ((112, 52, 40), poly((-.85, .45), (.85, .45), (.55, .9), (-.55, .9)))]),
    "ripples": ((.48, .64), (.2, .55), (.8, 1), [(1, wavy(-.4, .9)), (1, wavy(0, 1)), (1, wavy(.4, .7))]),
    "rock": ((0, .12), (.05, .2), (.35, .65), [
        (1, poly((-.9, .6), (-.75, -.1), (-.2, -.6), (.4, -.5), (.85, .1), (.9, .6))),
        (1.25, poly((-.6, 0), (-.15, -.45), (.2, -.35), (-.1, .1)))]),
    "flower": ((0, 1), (.6, .9), (.75, 1), [
        ((60, 130, 50), box(-.06, -.2, .06, 1)),
        *((1, ellipse(.42 * x, .42 * y - .25, .3, .3)) for x, y in ellipse(0, 0, 1, 1, -90, 270, 6)),
        ((250, 215, 80), ellipse(0, -.25, .22, .22))]),
    "house": ((0, 1), (.25, .5), (.7, .95), [
        (1, box(-.65, -.1, .65, .85)), ((142, 58, 48), poly((-.9, -.05), (.9, -.05), (0, -.9))),
        (BROWN, box(-.4, .25, -.05, .85)), ((70, 80, 110), box(.2, .15, .48, .45))]),
    "cloud": ((0, 1), (0, .03), (.75, 1), [
        (1, ellipse(-.45, .15, .5, .32)), (1, ellipse(.45, .15, .5, .32)), (1, ellipse(0, -.1, .5, .45))]),
    "mushroom": ((0, 1), (.6, .9), (.6, .9), [
        ((236, 226, 205), box(-.2, 0, .2, .85)), (1, ellipse(0, .1, .85, .95, 180, 360)),
        (WHITE, ellipse(-.4, -.15, .13, .13)), (WHITE, ellipse(.05, -.5, .13, .13))]),
    "fence": ((0, 1), (.35, .6), (.45, .75), [
        (.8, box(-.95, -.3, .95, -.12)), (.8, box(-.95, .25, .95, .43)),
        *((1, poly((-.15, .8), (-.15, -.5), (0, -.8), (.15, -.5), (.15, .8)) + (x, 0))
          for x in (-.65, 0, .65))])}
PLACE_KINDS = (("pine", "tree", "grass"), ("crests", "boat", "ripples"))    # index = place: 0 land, 1 water


def draw_thing(rng, kind, table=KINDS):
    *ranges, parts = table[kind]
    colour = hsv(*(rng.uniform(*r) for r in ranges))
    return [Shape(points, tint if isinstance(tint, tuple) else shade(colour, tint)) for tint, points in parts]


def scatter(rng, kinds, count, radius, table=KINDS):
    """[(shapes, frame)]: count[0]..count[1] things on a jittered 5x5 grid, far ones (higher up) first. table: KINDS."""
    n = rng.integers(count[0], count[1] + 1)
    cells = rng.choice(25, n, replace=False)
    centres = (np.stack([cells % 5, cells // 5], 1) + .5 + rng.uniform(-.32, .32, (n, 2))) / 5
    return [(draw_thing(rng, rng.choice(kinds), table), Frame(centre, rng.uniform(*radius), bool(rng.integers(2))))
            for centre in centres[centres[:, 1].argsort()]]


# ---------------------------------------------------------------- creatures
class Look(NamedTuple):
    """All there is to know about a creature. Lengths in body units, angles in degrees."""
    body: tuple             # half length, half height
    neck: float
    head: float             # radius
    face: str               # a key of FACES or BILLS, or a list such as those in FACES
    bill: tuple             # length, half height at the base and at the tip
    tail: str               # a key of TAILS
    tail_length: float
    tail_lift: float        # angle above the horizontal
    legs: int               # 0 (a fin instead), 2 or 4
    leg: float              # length below the body
    web: float              # 0 toes .. 1 webbed feet
    pattern: str            # one of PATTERNS
    skin: tuple             # colours: of the body,
    trim: tuple             # of wing or pattern, and tail,
    head_skin: tuple        # of head and neck,
    horn: tuple             # of bill and legs
    breast_skin: tuple = ()     # of breast and belly, if not the body's
    tail_skin: tuple = ()       # of the tail, if not that of wing and pattern


# What tells the classes apart: (landbird's range, waterbird's range). All other distributions are shared.
CUES = {"head_hue": ((.04, .04), (.47, .47)), "head": ((.46, .56), (.38, .48)), "neck": ((0, .35), (.7, 1.2)),
        "bill_length": ((.45, .6), (.75, .95)), "bill_base": ((.2, .25), (.14, .18)),
        "bill_tip": ((0, .02), (.06, .09)), "tail_length": ((.85, 1.15), (.45, .65)),
        "tail_lift": ((30, 58), (-5, 12)), "leg": ((.4, .55), (.6, .8)), "web": ((0, .1), (.8, 1))}
BILLS = {"cone": (.5, .22, 0), "flat": (.85, .16, .08), "needle": (1, .07, .02)}
FACES = {       # instead of a bill: (colour of the look, its shade, polygon in head radii)
    "hook": [("horn", 1, poly((.6, -.5), (1.1, -.4), (1.4, .05), (1.3, .7), (1, 1), (.95, .6), (.6, .5)))],
    "snout": [("head_skin", 1.2, ellipse(.95, .25, .65, .4)), ("horn", .15, ellipse(1.5, .1, .17, .15)),
              ("head_skin", .7, ellipse(-.75, -.35, .35, .7))],
    "ears": [("head_skin", .8, poly((-.85, -.6), (-.7, -1.5), (-.1, -.7))),
             ("head_skin", .8, poly((.05, -.7), (.55, -1.5), (.75, -.6))),
             ("horn", 1, ellipse(.95, .2, .2, .16))]}
TAILS = {       # polygons from the root along x; turned, stretched and moved to the body's rear end
    "feather": [poly((0, -.15), (1, -.3), (.82, .22), (0, .15))],
    "short": [poly((0, -.2), (.5, -.1), (.5, .1), (0, .2))],
    "fork": [poly((0, -.1), (1, -.5), (.65, 0), (1, .5), (0, .1))],
    "puff": [ellipse(.35, 0, .4, .4)],
    "whip": [poly((0, -.07), (.6, -.12), (1.1, -.4), (1.2, -.34), (.7, .04), (0, .07))],
    "fan": [poly((0, 0), *ellipse(0, 0, .95, .95, a - 13, a + 13)) for a in (-40, -13, 13, 40)]}
PATTERNS = ("wing", "plain", "stripes", "spots")


def colours(rng):
    value = rng.uniform(.35, .9)
    skin = hsv(rng.uniform(0, 1), rng.uniform(.15, .75), value)
    trim = shade(skin, rng.choice([.55, 1.4 if value < .7 else 1.2]))
    horn = hsv(rng.uniform(.03, .13), rng.uniform(.7, .95), rng.uniform(.75, 1))
    return dict(skin=skin, trim=trim, horn=horn)


def cued(ranges, which, cue):
    """The value or range of one of two classes; cue scales its distance from their midpoint."""
    middle = np.mean(ranges, axis=0)
    return middle + cue * (ranges[which] - middle)


def bird_look(rng, label, cue=1.0, hue_noise=.07):
    """A landbird (label 0) or waterbird (1). cue scales the difference: at 0 both are the midpoint."""
    t = {}
    for name, ranges in CUES.items():
        t[name] = rng.uniform(*cued(ranges, label, cue))
    head_skin = hsv(rng.normal(t.pop("head_hue"), hue_noise), rng.uniform(.5, .9), rng.uniform(.45, .95))
    bill = t.pop("bill_length"), t.pop("bill_base"), t.pop("bill_tip")
    return Look(body=(rng.uniform(1.04, 1.2), rng.uniform(.63, .71)), face="bill", bill=bill, tail="feather",
                legs=2, pattern="wing", head_skin=head_skin, **t, **colours(rng))


def any_look(rng):
    """A creature of no class: every feature is independent of every other."""
    face = str(rng.choice([*BILLS, *FACES]))
    return Look(body=(rng.uniform(.8, 1.3), rng.uniform(.5, .85)), neck=rng.uniform(0, 1.3), face=face,
                head=rng.uniform(.36, .56), bill=BILLS.get(face, (.45, 0, 0)), tail=str(rng.choice([*TAILS])),
                tail_length=rng.uniform(.5, 1.15), tail_lift=rng.uniform(-10, 60), leg=rng.uniform(.35, .85),
                legs=int(rng.choice([0, 2, 4])), web=rng.uniform(0, 1), pattern=str(rng.choice(PATTERNS)),
                head_skin=hsv(rng.uniform(0, 1), rng.uniform(.3, .9), rng.uniform(.4, .95)), **colours(rng))


def tail_shapes(look):
    """Drawn before the body, which hides its root -> shapes, {part: (x, y)}."""
    lift, length, skin = np.radians(look.tail_lift), look.tail_length, look.tail_skin or look.trim
    back, up = np.array([-np.cos(lift), -np.sin(lift)]), np.array([np.sin(lift), -np.cos(lift)])
    root = np.array([-.8 * look.body[0], -.22 * look.body[1]])
    shapes = [Shape(bar(root, root + .5 * back, .24), skin)]       # joins tail and body at any angle
    for i, outline in enumerate(TAILS[look.tail]):
        placed = root + (.25 + length * outline[:, :1]) * back - outline[:, 1:] * up
        shapes.append(Shape(placed, shade(skin, .8) if i % 2 else skin))
    return shapes, {"tail": root + (.25 + .5 * length) * back}


def leg_shapes(look):
    """Far legs first and darker -> shapes, {part: (x, y)}; the part is the ankle, where the leg is widest."""
    half, height = look.body
    if look.legs == 0:
        return [Shape(poly((-.1, .6 * height), (.35, .6 * height), (-.05, height + .45)), look.trim)], {}
    hips = {2: (.22, -.2), 4: (.42, -.5, .6, -.32)}[look.legs]
    toe, shapes, parts = .2 + .22 * look.web, [], {}
    foot = poly((-.1, 0), (0, -.09 - .15 * look.web), (toe, .03), (toe, .09), (-.1 - .05 * look.web, .09))
    for i, x in enumerate(hips):
        ankle, far = (x + .08, height + look.leg), i < look.legs // 2
        colour = shade(look.horn, .8) if far else look.horn
        shapes += [Shape(bar((x, .5 * height), ankle, .12), colour), Shape(foot + ankle, colour)]
        if look.legs == 2:
            parts["far leg" if far else "near leg"] = ankle
    return shapes, parts


def body_shapes(look):
    """Body and its pattern, drawn after tail and legs -> shapes, {part: (x, y)}."""
    half, height = look.body
    outlines = {"plain": [],
                "wing": [poly((-.1, -.35), (-.95, -.2), (-.1, .45)), ellipse(-.08, 0, .55, .52)],
                "stripes": [bar((x, -.9 * y), (x, .9 * y), .1) for x in (-.6, -.32, -.05, .22, .5)
                            for y in [np.sqrt(1 - x * x)]],
                "spots": [ellipse(x, y, .12, .2) for x, y in
                          ((0, 0), (-.5, -.3), (.45, -.35), (-.45, .4), (.4, .42), (-.02, -.6), (-.05, .62))]}
    breast = [Shape(ellipse(0, 0, half, height, -28, 150), look.breast_skin)] if look.breast_skin else []
    shapes = [Shape(ellipse(0, 0, half, height), look.skin), *breast,
              *(Shape(outline * look.body, look.trim) for outline in outlines[look.pattern])]
    return shapes, {"back": (-.1 * half, -.85 * height), "belly": (0, .85 * height),
                    "breast": (.75 * half, .3 * height), "near wing": (-.08, 0)}


def head_shapes(look):
    """Bill or face, neck, head, eye; drawn last -> shapes, {part: (x, y)}."""
    r, (length, base, tip) = look.head, look.bill
    root = np.array([.72 * look.body[0], -.42 * look.body[1]])              # of the neck, inside the body
    x, y = at = root + (.3 + look.neck) * np.array([.42, -.9])              # middle of the head
    outlines = look.face if isinstance(look.face, list) else FACES.get(look.face)
    if outlines:
        face = [Shape(points * r + at, shade(getattr(look, skin), tint)) for skin, tint, points in outlines]
    else:
        below = at + (0, .12 * r)
        bill = poly((.7 * r, -base), (r + length, -tip), (r + length, tip), (.7 * r, base)) + below
        gape = bar((.7 * r, 0), (r + .9 * length, 0), .05) + below
        face = [Shape(bill, look.horn), Shape(gape, shade(look.horn, .65))]
    eye = at + (.28 * r, -.2 * r)
    neck = poly(root + (-.27, .08), (x - .2, y), (x + .2, y), root + (.2, .22))
    shapes = [*face, Shape(neck, look.head_skin), Shape(ellipse(x, y, r, r), look.head_skin),
              Shape(ellipse(*eye, .17, .17), WHITE), Shape(ellipse(*eye, .11, .11), (15, 15, 20))]
    parts = {"crown": (-.1, -.85), "forehead": (.65, -.55), "nape": (-.8, .1), "throat": (.3, .8)}
    return shapes, {"beak": at + (r + .4 * length, .12 * r), "near eye": eye,
                    **{name: at + np.array(offset) * r for name, offset in parts.items()}}


def creature(look):
    """Look -> shapes back to front, {part: (x, y)}; the origin is the middle of its extent.

    Parts are CUB's, but of the near or far side: which of them is left is known once it is mirrored or not.
    """
    shapes, parts = [], {}
    for draw in (tail_shapes, leg_shapes, body_shapes, head_shapes):
        more, named = draw(look)
        shapes, parts = shapes + more, parts | named
    corners = np.concatenate([s.points for s in shapes])
    middle = (corners.min(0) + corners.max(0)) / 2
    shapes = [Shape(s.points - middle, s.colour) for s in shapes]
    return shapes, {name: xy - middle for name, xy in parts.items()}


# ---------------------------------------------------------------- scenes
class Scene(NamedTuple):
    image: np.ndarray       # (S, S, 3) uint8
    plain: np.ndarray       # (S, S, 3) uint8, the same picture without things
    mask: np.ndarray        # (S, S) float, share of each pixel that the creature covers
    parts: dict             # name: (x, y) as a share of the side
    mirror: bool            # True: the creature faces left


def backdrop(rng, size):
    """(S, S, 3) uint8: two colours joined by a soft horizon, under two octaves of noise."""
    top, bottom = (np.array(hsv(rng.uniform(0, 1), rng.uniform(.05, .5), rng.uniform(.25, .9))) / 255
                   for _ in range(2))
    horizon, softness = rng.uniform(.3, .7), rng.uniform(.02, .1)
    below = 1 / (1 + np.exp((horizon - np.linspace(0, 1, size)) / softness))        # (S,)
    colour = (top + below[:, None] * (bottom - top))[:, None]                       # (S, 1, 3)
    for cells, amplitude in ((5, .2), (16, .14)):
        colour = colour + amplitude * smooth_noise(rng, cells, size)
    return (colour.clip(0, 1) * 255).astype(np.uint8)


def pose(rng, unit, shift):
    """A frame around the middle of the picture, up to 20 degrees askew, facing either way."""
    return Frame(.5 + rng.uniform(-shift, shift, 2), rng.uniform(*unit), bool(rng.integers(2)),
                 np.radians(rng.uniform(-20, 20)))


def smooth_noise(rng, cells, size):
    """(S, S, 1) float, about -0.5..0.5: a random grid of cells x cells, blown up smoothly."""
    noise = Image.fromarray(rng.uniform(-.5, .5, (cells, cells)).astype(np.float32))
    return np.asarray(noise.resize((size, size), Image.BICUBIC))[..., None]


def compose(rng, size, body, frame, coat, draw_things):
    """Backdrop, things, body. Random numbers for things come last, so that they change nothing else.

    body: (shapes, parts), such as creature(look); draw_things(rng) -> [(shapes, frame)], far ones first.
    """
    ground = Image.fromarray(backdrop(rng, size)).resize((SUPERSAMPLE * size,) * 2, Image.NEAREST)
    shapes, parts = body
    canvas = Image.new("L", ground.size)
    paint(canvas, shapes, frame, colour=255)
    mask = np.asarray(canvas.reduce(SUPERSAMPLE)) / 255
    noise = rng.normal(0, 255 * PIXEL_NOISE, (size, size, 3))
    noise = noise + mask[..., None] * 255 * coat * smooth_noise(rng, COAT_CELLS, size)
    pictures = []
    for things in ([], draw_things(rng)):
        canvas = ground.copy()
        for thing, where in things:
            paint(canvas, thing, where)
        paint(canvas, shapes, frame)
        pictures.append((canvas.reduce(SUPERSAMPLE) + noise).round().clip(0, 255).astype(np.uint8))
    parts = {name: frame.place(xy) for name, xy in parts.items()}
    return Scene(pictures[1], pictures[0], mask, parts, frame.mirror)


def empty(rng, size, draw_things):
    """(S, S, 3) uint8: a backdrop and things, nobody there."""
    return compose(rng, size, ([], {}), Frame((0, 0), 1, False), 0, draw_things).image


def pretraining_scene(rng, size=96):
    """One creature of any kind, things independent of it -> image (S, S, 3) uint8, mask (S, S) float 0..1."""
    look = bird_look(rng, rng.integers(2)) if rng.uniform() < 1 / 3 else any_look(rng)
    frame = pose(rng, unit=(.13, .24), shift=.14)
    kinds = (*PLACE_KINDS, rng.choice([*KINDS], 3, replace=False))[rng.choice(3, p=(.225, .225, .55))]
    scene = compose(rng, size, creature(look), frame, COAT,
                    partial(scatter, kinds=kinds, count=(3, 10), radius=(.055, .095)))
    return scene.image, scene.mask


def _pretraining_scene(index, seed, size):
    image, mask = pretraining_scene(np.random.default_rng([seed, PRETRAIN, index]), size)
    return image, (255 * mask).astype(np.uint8)


def pretraining_scenes(n, seed, size=96, workers=None):
    """n scenes for self-supervision -> images (n, S, S, 3) uint8, masks (n, S, S) uint8, 255 = creature."""
    require(n >= 1, "n", "at least 1", n)
    require(size >= 32 and size % 8 == 0, "size", "a multiple of 8 from 32 on", size)
    images, masks = np.empty((n, size, size, 3), np.uint8), np.empty((n, size, size), np.uint8)
    draw = partial(_pretraining_scene, seed=seed, size=size)
    for i, (image, mask) in enumerate(in_parallel(draw, range(n), "pretraining scenes", workers)):
        images[i], masks[i] = image, mask
    return images, masks


# ---------------------------------------------------------------- all cores
def in_parallel(function, jobs, title, workers=None):
    """Yield function(job) in order, on all cores; small work stays here: a pool starts slowly."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = workers or min(cores, 1 + len(jobs) // 100)
    if workers == 1:
        yield from progress(map(function, jobs), len(jobs), title)
        return
    # Not fork: the caller may run torch's threads, and a lock that one holds stays locked in a forked copy.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), follow_parent) as pool:
        yield from progress(pool.map(function, jobs, chunksize=16), len(jobs), title)


def follow_parent():
    """In a worker: leave Ctrl-C to the parent, and end when it ends, even killed; else it waits for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def progress(results, total, title):
    """Pass results on, with a bar on a terminal and four plain lines elsewhere (none for small work)."""
    terminal = sys.stderr.isatty()
    for i, result in enumerate(tqdm(results, title, total, leave=False, disable=not terminal), 1):
        if not terminal and total >= 100 and i * 4 // total > (i - 1) * 4 // total:
            print(f"{title}: {i} of {total}", file=sys.stderr, flush=True)
        yield result


# ---------------------------------------------------------------- what all miniatures share
class Row(NamedTuple):
    """One example of a miniature."""
    id: int             # 1-based
    file: str           # <folder>/<name>, as in the benchmark
    label: int
    place: int          # the context that is drawn around it
    split: int          # index into the miniature's SPLITS
    index: int          # within its split; (seed, split, index) decides what is drawn


class Miniature:
    """Base of the miniatures, dataclasses of knobs: checks knobs by their names, counts, draws a sheet."""
    SPLITS = ("train", "val", "test")
    GROUPS = ()             # names; group(row) is an index into them
    COUNTS = ("train", "val", "test")
    SHARES = ("agreement", "cue", "hue_noise", "coat")
    RANGES = {"things": (0, 25), "thing_radius": (.01, .3), "bird": (.05, .3), "pet": (.05, .3), "object": (.05, .25),
              "depth": (.02, .15)}

    def __post_init__(self):
        for f in fields(self):
            name, value = f.name, getattr(self, f.name)
            if name in self.COUNTS:
                require(value >= 1, name, "at least 1", value)
            elif name in self.SHARES:
                require(0 <= value <= 1, name, "between 0 and 1", value)
            elif name in self.RANGES:
                (low, high), (floor, top) = value, self.RANGES[name]
                require(floor <= low <= high <= top, name,
                        f"a smaller and a larger number between {floor} and {top}", f"{low} {high}")
        require(self.size >= 32 and self.size % 8 == 0, "size", "a multiple of 8 from 32 on", self.size)
        require(self.seed >= 0, "seed", "at least 0", self.seed)

    def group(self, row):
        return 2 * row.label + row.place

    def summary(self):
        """Table of examples per split and group; many groups are the lines, few are the columns."""
        pairs = [(r.split, self.group(r)) for r in self.rows()]
        counts = [["split", *self.GROUPS], *([name, *(f"{pairs.count((split, g)):,}" for g in range(len(self.GROUPS)))]
                                             for split, name in enumerate(self.SPLITS))]
        table = counts if len(self.GROUPS) <= 4 else [*zip(*counts)]
        first, width = (max(len(line[0]) for line in table), max(len(cell) for line in table for cell in line[1:]) + 2)
        return "\n".join(f"{line[0]:{first + 1}}" + "".join(f"{cell:>{width}}" for cell in line[1:]) for line in table)

    def picture(self, row):
        """(S, S, 3) uint8: what the sheet shows of an example."""
        return self.scene(row).image

    def sheet(self, columns=8):
        """(groups * S, columns * S, 3) uint8: a line of examples per group, white where it has too few."""
        rows, S = self.rows(), self.size
        sheet = np.full((len(self.GROUPS), S, columns, S, 3), 255, np.uint8)
        for group in range(len(self.GROUPS)):
            for column, row in enumerate([r for r in rows if self.group(r) == group][:columns]):
                sheet[group, :, column] = self.picture(row)
        return sheet.reshape(len(self.GROUPS) * S, columns * S, 3)


def note(root, knobs, **more):
    """miniature.json beside the benchmark's folders: why counts are not the benchmark's, and what was drawn."""
    write_json(root / "miniature.json", {"knobs": asdict(knobs), **more})


def save(picture, path, **options):
    Image.fromarray(picture).save(path, **options)


# The usual 4:2:0 keeps one colour per 2x2 pixels: the backdrop would smear over the object's edge.
save_jpeg = partial(save, format="JPEG", quality=95, subsampling=0)


def share(rate, rank, n):
    """True for the first round(rate * n) of n ranks: shares are exact, not drawn."""
    return rank < round(rate * n)


def save_mask(mask, path):
    """Share of each pixel that is covered -> 0 or 255: object where it covers half of a pixel or more."""
    save((mask >= .5).astype(np.uint8) * 255, path)


def require(ok, name, wanted, value):
    if not ok:
        raise UsageError(f"{name} must be {wanted}, not {value}")
