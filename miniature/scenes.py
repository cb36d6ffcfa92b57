"""scenes.py: pictures with their exact mask: a creature among things on a backdrop. And what all miniatures share.

Floor: data. Read objects.py first. Every miniature is a subclass of Miniature, at the end, and draws with compose();
so does the pretraining of their backbone (pretrain.py). Creatures have a coat, a fine grain that nothing else has.

Letters: S side of a picture in pixels. Local coordinates: x to the right (creatures face right), y down.
Mask: 1 = creature, 0 = anything else, between = the covered share of an edge pixel.
"""
import io
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields, make_dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from miniature.objects import (BLACK, PLACE_KINDS, SCENERY, WHITE, Frame, Shape, bar, ellipse, hsv, paint, poly,
                               scatter, shade)
from settings import UsageError, check_bounds, check_range, opt, progress, write_json

SUPERSAMPLE = 2         # scenes are drawn twice as large and box-filtered: soft edges, soft masks
PIXEL_NOISE = 0.02      # standard deviation on a 0..1 scale
COAT, COAT_CELLS = 0.8, 48      # strength of the grain of feathers and fur; its cells across the picture
PRETRAIN = 3            # a use of the seed of its own: no benchmark draws the same scene


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
BODY_PLAN = ("background", "tail", "leg", "body", "head", "neck")        # of every creature: Shape.part


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
    t = {name: rng.uniform(*cued(ranges, label, cue)) for name, ranges in CUES.items()}
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
    shapes = [*face, Shape(neck, look.head_skin, BODY_PLAN.index("neck")), Shape(ellipse(x, y, r, r), look.head_skin),
              Shape(ellipse(*eye, .17, .17), WHITE), Shape(ellipse(*eye, .11, .11), BLACK)]
    parts = {"crown": (-.1, -.85), "forehead": (.65, -.55), "nape": (-.8, .1), "throat": (.3, .8)}
    return shapes, {"beak": at + (r + .4 * length, .12 * r), "near eye": eye,
                    **{name: at + np.array(offset) * r for name, offset in parts.items()}}


def creature(look):
    """Look -> shapes back to front, {part: (x, y)}; the origin is the middle of its extent.

    Parts are CUB's, but of the near or far side: which of them is left is known once it is mirrored or not.
    """
    shapes, parts = [], {}
    for part, draw in enumerate((tail_shapes, leg_shapes, body_shapes, head_shapes), 1):
        more, named = draw(look)
        shapes, parts = shapes + [s._replace(part=s.part or part) for s in more], parts | named
    corners = np.concatenate([s.points for s in shapes])
    middle = (corners.min(0) + corners.max(0)) / 2
    shapes = [s._replace(points=s.points - middle) for s in shapes]
    return shapes, {name: xy - middle for name, xy in parts.items()}


# (cat's range, dog's range); all that is not listed is shared
PET_CUES = {"head_hue": ((.05, .05), (.25, .25)), "ear": ((0, .15), (.85, 1)), "muzzle": ((0, .15), (.85, 1)),
            "head": ((.5, .56), (.44, .5)), "neck": ((0, .15), (.2, .4)), "body": ((1.1, 1.25), (1, 1.15)),
            "height": ((.5, .56), (.58, .66)), "leg": ((.35, .5), (.55, .7)), "tail_length": ((.95, 1.15), (.5, .7)),
            "tail_lift": ((35, 60), (0, 30))}


def mix(a, b, t):
    """From a to b as t goes from 0 to 1, for numbers or arrays of corners."""
    return (1 - t) * np.asarray(a, float) + t * np.asarray(b, float)


def pet_look(rng, label, cue, hue_noise=0.0):
    """A cat (label 0) or dog (1). cue scales the difference: at 0 both are the midpoint. hue_noise: of heads."""
    t = {name: rng.uniform(*cued(ranges, label, cue)) for name, ranges in PET_CUES.items()}
    ear, muzzle, head_hue = t.pop("ear"), t.pop("muzzle"), t.pop("head_hue")
    reach = mix(.7, 1.05, muzzle)
    face = [("head_skin", 1.2, ellipse(reach, .28, mix(.3, .62, muzzle), mix(.3, .36, muzzle))),
            ("horn", .2, ellipse(reach + mix(.26, .52, muzzle), .14, .15, .13)),
            ("trim", .8, mix(poly((-.9, -.45), (-.75, -1.55), (-.1, -.8)),
                             poly((-.75, -.75), (-1.05, .55), (-.35, -.1)), ear)),
            ("trim", .8, mix(poly((.05, -.8), (.5, -1.55), (.75, -.6)),
                             poly((-.15, -.85), (.15, -1), (.35, -.7)), ear))]
    look = colours(rng)
    head_skin = hsv(rng.normal(head_hue, hue_noise), rng.uniform(.5, .9), rng.uniform(.45, .95))
    return Look(body=(t.pop("body"), t.pop("height")), face=face, bill=(.45, 0, 0), tail="whip", legs=4, web=0,
                pattern=str(rng.choice(("plain", "stripes", "spots"))), head_skin=head_skin, **t,
                **look | {"horn": shade(head_skin, .8)})


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


def compose(rng, size, body=((), {}), frame=Frame((0, 0), 1, False), coat=0, draw_things=lambda rng: ()):
    """Backdrop, things, body. Random numbers for things come last, so that they change nothing else.

    body: (shapes, parts), such as creature(look), or nobody; draw_things(rng) -> [(shapes, frame)], far ones first.
    """
    ground = Image.fromarray(backdrop(rng, size)).resize((SUPERSAMPLE * size,) * 2, Image.NEAREST)
    shapes, parts = body
    canvas = Image.new("L", ground.size)
    paint(canvas, shapes, frame, lambda shape: 255)
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


def part_map(shapes, frame, size):
    """Which part of a creature each pixel shows -> (S, S) uint8, an index into BODY_PLAN, 0 where there is none."""
    canvas = Image.new("L", (SUPERSAMPLE * size,) * 2)
    paint(canvas, shapes, frame, lambda shape: shape.part)
    return np.asarray(canvas)[::SUPERSAMPLE, ::SUPERSAMPLE]


def any_creature(rng):
    return bird_look(rng, rng.integers(2)) if rng.uniform() < 1 / 3 else any_look(rng)


def anywhere(rng, body, size, coat):
    """A creature() in a pose, on a backdrop, among things that are independent of it -> Scene, the creature's Frame."""
    frame = pose(rng, unit=(.13, .24), shift=.14)
    kinds = (*PLACE_KINDS, rng.choice([*SCENERY], 3, replace=False))[rng.choice(3, p=(.225, .225, .55))]
    return compose(rng, size, body, frame, coat,
                   partial(scatter, kinds=kinds, count=(3, 10), radius=(.055, .095))), frame


def pretraining_scene(index, seed, size):
    """One creature of any kind -> image (S, S, 3), mask (S, S), part map (S, S), all uint8."""
    rng = np.random.default_rng([seed, PRETRAIN, index])
    body = creature(any_creature(rng))
    scene, frame = anywhere(rng, body, size, COAT)
    return scene.image, (255 * scene.mask).astype(np.uint8), part_map(body[0], frame, size)


def pretraining_pair(index, seed, size, coat):
    """One creature in two scenes, as in two moments of a film -> images (2, S, S, 3), masks (2, S, S), frames (2, 5).

    Its shape is the same; its colours, its pattern, the strength of its grain (from the range `coat`), its pose, the
    ground and the things are each scene's own. A frame is (x, y, scale, mirror, turn) of Frame.
    """
    rng = np.random.default_rng([seed, PRETRAIN, index])
    look, drawn = any_creature(rng), []
    for _ in range(2):
        skins = colours(rng) | {"head_skin": hsv(rng.uniform(0, 1), rng.uniform(.3, .9), rng.uniform(.4, .95))}
        mine = look._replace(pattern=str(rng.choice(PATTERNS)), **skins)
        scene, frame = anywhere(rng, creature(mine), size, rng.uniform(*coat))
        drawn.append((scene.image, (255 * scene.mask).astype(np.uint8), (*frame.centre, *frame[1:])))
    return tuple(np.stack(x) for x in zip(*drawn))


def pretraining_scenes(n, seed, size=96):
    """n scenes for self-supervision -> (n, S, S, 4) uint8, colours and mask, 255 = creature; part maps (n, S, S)."""
    scenes, parts = np.empty((n, size, size, 4), np.uint8), np.empty((n, size, size), np.uint8)
    draw = partial(pretraining_scene, seed=seed, size=size)
    for i, (image, mask, part) in enumerate(in_parallel(draw, range(n), "pretraining scenes")):
        scenes[i], parts[i] = np.dstack([image, mask]), part
    return scenes, parts


def pretraining_pairs(n, seed, coat, size=96):
    """n pairs of scenes that show the same creature -> (n, 2, S, S, 4) uint8, frames (n, 2, 5) float32."""
    scenes, frames = np.empty((n, 2, size, size, 4), np.uint8), np.empty((n, 2, 5), np.float32)
    draw = partial(pretraining_pair, seed=seed, size=size, coat=coat)
    for i, (images, masks, where) in enumerate(in_parallel(draw, range(n), "pretraining pairs")):
        scenes[i], frames[i] = np.concatenate([images, masks[..., None]], 3), where
    return scenes, frames


def in_parallel(function, jobs, title, workers=None):
    """Yield function(job) in order, on all cores; small work stays here: a pool starts slowly."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = workers or min(cores, 1 + len(jobs) // 100)
    if workers == 1:
        yield from progress(map(function, jobs), title, len(jobs))
        return
    # Not fork: the caller may run torch's threads, and a lock that one holds stays locked in a forked copy.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), follow_parent) as pool:
        yield from progress(pool.map(function, jobs, chunksize=16), title, len(jobs))


def follow_parent():
    """In a worker: leave Ctrl-C to the parent, and end when it ends, even killed; else it waits for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# ---------------------------------------------------------------- what all miniatures share
SHARE, BODY = dict(at_least=0, at_most=1), dict(at_least=.05, at_most=.3)
KNOBS = {           # all that settings.opt says of a knob but its default; a miniature says which knobs it has
    "train": dict(help="training examples, as many of each class", at_least=1, at_most=10 ** 6),
    "val": dict(help="validation examples, as many of each class", at_least=1, at_most=10 ** 6),
    "test": dict(help="test examples, as many of each class", at_least=1, at_most=10 ** 6),
    "size": dict(help="side of a picture in pixels, a multiple of 8", at_least=32, at_most=4096, a_multiple_of=8),
    "wnids": dict(help="ImageNet classes in each of the nine groups", at_least=1, at_most=2),
    "agreement": dict(SHARE, help="share of each class whose place (or tube) agrees, where it is not balanced"),
    "things": dict(help="fewest and most things that mark the place", at_least=0, at_most=25),
    "thing_radius": dict(help="smallest and largest thing, as a share of the side", at_least=.01, at_most=.3),
    "bird": dict(BODY, help="smallest and largest bird: half a body, as a share of the side"),
    "pet": dict(BODY, help="smallest and largest animal: half a body, as a share of the side"),
    "object": dict(help="smallest and largest object: a third of its length, as a share of the side",
                   at_least=.05, at_most=.25),
    "depth": dict(help="least and greatest depth of a pneumothorax, as a share of the side", at_least=.02, at_most=.15),
    "cue": dict(SHARE, help="how much the classes differ in shape and colours; 0 = not at all"),
    "coat": dict(SHARE, help="strength of the fine grain that the creature (object, lung) has and nothing else has"),
    "hue_noise": dict(SHARE, help="standard deviation of hues within a class; 1 = the full circle"),
    "dicom": dict(help="Kaggle's layout, which needs pydicom; else the prepared one"),
    "seed": dict(help="a scene depends on (seed, split, index) only", at_least=0)}


def with_knobs(base, **defaults):
    """A frozen dataclass above base whose fields are these knobs, in this order."""
    knobs = [(name, type(default), opt(default, **KNOBS[name])) for name, default in defaults.items()]
    return make_dataclass(f"{base.__name__}Knobs", knobs, bases=(base,), frozen=True)


class Row(NamedTuple):
    """One example of a miniature."""
    id: int             # 1-based
    file: str           # <folder>/<name>, as in the benchmark
    label: int
    place: int          # the context that is drawn around it
    split: int          # index into the miniature's SPLITS
    index: int          # within its split; (seed, split, index) decides what is drawn


class Miniature:
    """Base of the miniatures, dataclasses of knobs: deals out examples, draws and writes one, shows some in a sheet.

    A miniature names its examples in rows() and puts a subject() into the scene of each; the rest is here, but for
    what its benchmark does differently.
    """
    SPLITS = ("train", "test")      # each is also the knob that says how many examples it has
    EVEN = ()                       # splits where half of each class agree with the place, whatever `agreement` says
    CLASSES, PLACES = (), ()        # PLACES: the kinds of things that lie there
    GROUPS = ()                     # names; group(row) is an index into them
    TOPS = ()                       # folders of the pictures, of their masks
    FOLDER = ""                     # what the cache is called, if not like the benchmark
    USE = 0                         # of the seed, where another miniature draws like this one

    def __post_init__(self):
        check_bounds(self)
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, tuple):
                check_range(f.name, value)

    def group(self, row):
        return row.label

    def examples(self):
        """[(label, place, split, index)]. Counts are exact, not drawn: in each class, a share of `agreement` agrees."""
        C, P, found = len(self.CLASSES), len(self.PLACES), []
        for split, name in enumerate(self.SPLITS):
            n, rate = getattr(self, name), .5 if name in self.EVEN else self.agreement
            for index in range(n):
                label, rank = index % C, index // C
                agrees = rank < round(rate * ((n + C - 1 - label) // C))            # times the size of this class
                place = label if agrees else label + 1 + rank % (P - 1)             # or each other place in turn
                found.append((label, place % P, split, index))
        return found

    def scene(self, row):
        """The place decides which things there are and nothing else: subject, backdrop and noise ignore it."""
        rng = np.random.default_rng([self.seed, self.USE + row.split, row.index])
        return compose(rng, self.size, *self.subject(rng, row.label), self.coat, partial(self.things_at, row.place))

    def things_at(self, place, rng):
        """[(shapes, frame)] of what lies at a place."""
        return scatter(rng, self.PLACES[place], self.things, self.thing_radius)

    def picture(self, row):
        """(S, S, 3) uint8: what the sheet shows of an example."""
        return self.scene(row).image

    def folders(self, rows):
        """The folders that write() needs. It makes none: an orphan of a killed rendering must not bring them back."""
        return [f"{top}/{folder}" for top in self.TOPS for folder in {row.file.rpartition("/")[0] for row in rows}]

    def write(self, row, root):
        """Draw one example and save it -> what finish() needs to know of it."""
        scene = self.scene(row)
        save(scene.image, root / self.TOPS[0] / row.file)
        save(scene.mask >= .5, (root / self.TOPS[1] / row.file).with_suffix(".png"))

    def finish(self, root, rows, drawn, **more):
        """miniature.json beside the benchmark's folders: why counts are not the benchmark's, and what was drawn."""
        write_json(root / "miniature.json", {"knobs": asdict(self), **more})

    def complete(self, root):
        """Add to a folder that an earlier version drew what it did not write; no picture may change."""

    def summary(self):
        """Table of examples per split and group; many groups are the lines, few are the columns."""
        pairs = [(r.split, self.group(r)) for r in self.rows()]
        counts = [["split", *self.GROUPS], *([name, *(f"{pairs.count((split, g)):,}" for g in range(len(self.GROUPS)))]
                                             for split, name in enumerate(self.SPLITS))]
        table = counts if len(self.GROUPS) <= 4 else [*zip(*counts)]
        first, width = (max(len(line[0]) for line in table), max(len(cell) for line in table for cell in line[1:]) + 2)
        return "\n".join(f"{line[0]:{first + 1}}" + "".join(f"{cell:>{width}}" for cell in line[1:]) for line in table)

    def sheet(self, columns=8):
        """(groups * S, columns * S, 3) uint8: a line of examples per group, white where it has too few."""
        rows, S = self.rows(), self.size
        sheet = np.full((len(self.GROUPS), S, columns, S, 3), 255, np.uint8)
        for group in range(len(self.GROUPS)):
            for column, row in enumerate([r for r in rows if self.group(r) == group][:columns]):
                sheet[group, :, column] = self.picture(row)
        return sheet.reshape(len(self.GROUPS) * S, columns * S, 3)


def save(picture, path):
    """uint8, or bool for black and white, -> an image file in the format of its name."""
    picture = picture * np.uint8(255) if picture.dtype == bool else picture
    file = io.BytesIO()                                  # Pillow says nothing where the disk takes half of a file
    # JPEG's usual 4:2:0 keeps one colour per 2x2 pixels: the backdrop would smear over the object's edge.
    Image.fromarray(picture).save(file, Image.registered_extensions()[path.suffix.lower()], quality=95, subsampling=0)
    path.write_bytes(file.getvalue())
