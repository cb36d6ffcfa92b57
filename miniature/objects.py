"""objects.py: filled polygons, and all that is drawn from them but creatures: trees, boats, sofas, cars, beetles.

Floor: data. Nothing to read before it; scenes.py comes next. Every miniature draws from KINDS, and so does the
pretraining of their backbone. Local coordinates: x to the right (things face right), y down.
"""
import colorsys
from typing import NamedTuple

import numpy as np
from PIL import ImageDraw

BROWN, WHITE, BLACK = (100, 66, 38), (243, 246, 250), (15, 15, 20)
DARK, GREY, STEEL = (40, 40, 48), (130, 130, 135), (90, 95, 105)


# ---------------------------------------------------------------- shapes
class Shape(NamedTuple):
    points: np.ndarray      # (n, 2) corners of a filled polygon, local coordinates
    colour: tuple           # three whole numbers, 0..255
    part: int = 0           # of a creature: an index into scenes.BODY_PLAN


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


def paint(canvas, shapes, frame, colour=lambda shape: shape.colour):
    """Draw shapes on a square PIL image, in order. A mask is the same polygons, all in one colour."""
    draw = ImageDraw.Draw(canvas)
    for shape in shapes:
        corners = frame.place(shape.points) * canvas.width
        draw.polygon(corners.ravel().tolist(), colour(shape))


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


def ribbon(x, y, half):
    """A band of half width `half` around the line through x, y, as a polygon."""
    line = np.stack([x, y], 1)
    return np.concatenate([line - (0, half), line[::-1] + (0, half)])


def wavy(y, half):
    """A wavy line of the given half length around height y, as a polygon."""
    x = np.linspace(-half, half, 13)
    return ribbon(x, y + .13 * np.sin(9 * x), .06)


def ellipse(x, y, rx, ry, start=0, stop=360, n=24):
    """Points (n, 2); with angles, in degrees clockwise from the right, the segment between them."""
    angle = np.radians(np.linspace(start, stop, n))
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1)


# ---------------------------------------------------------------- things
def wheel(x, y, r):
    """A tyre, its hole, and spokes."""
    return [(DARK, ellipse(x, y, r, r)), ((205, 208, 212), ellipse(x, y, .74 * r, .74 * r)),
            *((DARK, bar((x - .8 * r * c, y - .8 * r * s), (x + .8 * r * c, y + .8 * r * s), .05))
              for c, s in ((1, 0), (.5, .87), (-.5, .87)))]


def eye(x, y):
    return [(WHITE, ellipse(x, y, .11, .11)), (BLACK, ellipse(x, y, .07, .07))]


# Tables of things. kind: ranges of hue, saturation, value; polygons in radius 1, each with a shade of that colour or a
# colour of its own.
SCENERY = {
    "pine": ((.27, .45), (.5, .9), (.3, .7), [(BROWN, box(-.13, .6, .13, 1)),
        (.8, poly((-.75, .75), (.75, .75), (0, -.1))), (.95, poly((-.6, .3), (.6, .3), (0, -.5))),
        (1.1, poly((-.42, -.15), (.42, -.15), (0, -1)))]),
    "tree": ((.15, .42), (.5, .9), (.3, .75), [(BROWN, box(-.13, .3, .13, 1)), (1, ellipse(-.3, .05, .45, .4)),
        (1, ellipse(.3, .05, .45, .4)), (1, ellipse(0, -.35, .62, .58)), (1.25, ellipse(-.15, -.5, .3, .26))]),
    "grass": ((.15, .38), (.6, .9), (.4, .8), [
        (.75 + .05 * (5 * i % 7), poly((x - .09, .7), (x + .09, .7), (2.1 * x, -.2 - .25 * (3 * i % 4))))
        for i, x in enumerate(np.linspace(-.4, .4, 7))]),
    "crests": ((.52, .66), (.6, .9), (.45, .85), [
        (tint, ellipse(x, .25, r, 1.15 * r, 180, 360))
        for x in (-.66, 0, .66) for r, tint in ((.4, WHITE), (.29, 1))]),
    "boat": ((0, 1), (.05, .2), (.85, 1), [(.85, poly((-.05, -1), (-.05, .35), (-.65, .35))),
        (1, poly((.05, -.85), (.05, .35), (.6, .35))), (BROWN, box(-.03, -1, .03, .5)),
        ((112, 52, 40), poly((-.85, .45), (.85, .45), (.55, .9), (-.55, .9)))]),
    "ripples": ((.48, .64), (.2, .55), (.8, 1), [(1, wavy(-.4, .9)), (1, wavy(0, 1)), (1, wavy(.4, .7))]),
    "rock": ((0, .12), (.05, .2), (.35, .65), [
        (1, poly((-.9, .6), (-.75, -.1), (-.2, -.6), (.4, -.5), (.85, .1), (.9, .6))),
        (1.25, poly((-.6, 0), (-.15, -.45), (.2, -.35), (-.1, .1)))]),
    "flower": ((0, 1), (.6, .9), (.75, 1), [((60, 130, 50), box(-.06, -.2, .06, 1)),
        *((1, ellipse(.42 * x, .42 * y - .25, .3, .3)) for x, y in ellipse(0, 0, 1, 1, -90, 270, 6)),
        ((250, 215, 80), ellipse(0, -.25, .22, .22))]),
    "house": ((0, 1), (.25, .5), (.7, .95), [(1, box(-.65, -.1, .65, .85)),
        ((142, 58, 48), poly((-.9, -.05), (.9, -.05), (0, -.9))), (BROWN, box(-.4, .25, -.05, .85)),
        ((70, 80, 110), box(.2, .15, .48, .45))]),
    "cloud": ((0, 1), (0, .03), (.75, 1), [(1, ellipse(-.45, .15, .5, .32)), (1, ellipse(.45, .15, .5, .32)),
        (1, ellipse(0, -.1, .5, .45))]),
    "mushroom": ((0, 1), (.6, .9), (.6, .9), [((236, 226, 205), box(-.2, 0, .2, .85)),
        (1, ellipse(0, .1, .85, .95, 180, 360)), (WHITE, ellipse(-.4, -.15, .13, .13)),
        (WHITE, ellipse(.05, -.5, .13, .13))]),
    "fence": ((0, 1), (.35, .6), (.45, .75), [(.8, box(-.95, -.3, .95, -.12)), (.8, box(-.95, .25, .95, .43)),
        *((1, poly((-.15, .8), (-.15, -.5), (0, -.8), (.15, -.5), (.15, .8)) + (x, 0)) for x in (-.65, 0, .65))])}
FURNITURE = {       # large things: a context is named after one of them
    "sofa": ((0, 1), (.4, .75), (.4, .75), [(1, box(-.85, -.5, .85, .3)), (.75, box(-.02, -.45, .02, .1)),
        (1.25, box(-.75, 0, .75, .32)), (.8, box(-1, -.15, -.72, .5)), (.8, box(.72, -.15, 1, .5)),
        (.7, box(-.75, .3, .75, .5)), (BROWN, box(-.9, .5, -.76, .68)), (BROWN, box(.76, .5, .9, .68))]),
    "bed": ((0, 1), (.35, .7), (.6, .9), [(BROWN, box(-1, -.7, -.86, .7)), (BROWN, box(.88, -.2, 1, .7)),
        (WHITE, box(-.87, .02, .9, .4)), (WHITE, ellipse(-.6, -.08, .26, .17)),
        (1, poly((-.35, -.1), (.9, -.06), (.9, .42), (-.35, .42))), (.75, box(-.35, -.1, -.2, .42))]),
    "shelf": ((.04, .1), (.5, .7), (.4, .65), [(1, box(-.7, -1, .7, 1)), (.45, box(-.6, -.9, .6, -.35)),
        (.45, box(-.6, -.22, .6, .3)), (.45, box(-.6, .43, .6, .9)),
        *((colour, box(x, y - h, x + .15, y)) for x, y, h, colour in (
            (-.52, -.35, .42, (190, 60, 50)), (-.34, -.35, .36, (60, 110, 170)), (-.1, -.35, .44, (220, 190, 80)),
            (.2, .3, .4, (80, 150, 90)), (.38, .3, .44, (200, 200, 205)), (-.5, .3, .3, (150, 80, 150)),
            (-.3, .9, .36, (220, 140, 60)), (.3, .9, .42, (70, 130, 140))))]),
    "bench": ((.05, .1), (.5, .75), (.45, .7), [
        *((tint, box(-1, y, 1, y + .16)) for y, tint in ((-.6, 1), (-.36, 1.1), (-.12, .9), (.1, 1.2))),
        *((STEEL, box(x - .06, -.65, x + .06, .75)) for x in (-.75, .75))]),
    "bike": ((0, 1), (.6, .9), (.5, .9), [*wheel(-.55, .3, .45), *wheel(.55, .3, .45),
        *((1, bar(a, b, .1)) for a, b in (((-.55, .3), (-.25, -.3)), ((-.25, -.3), (.4, -.3)), ((0, .3), (.4, -.3)),
                                          ((-.55, .3), (0, .3)), ((-.25, -.3), (0, .3)), ((.55, .3), (.36, -.5)))),
        (DARK, ellipse(-.3, -.4, .2, .08)), (DARK, bar((.2, -.52), (.5, -.56), .09))])}
SMALL = {           # things that come with a room or a street
    "lamp": ((.08, .15), (.2, .6), (.85, 1), [(DARK, box(-.05, -.2, .05, .85)), (DARK, ellipse(0, .88, .4, .12)),
        (1, poly((-.3, -.9), (.3, -.9), (.55, -.1), (-.55, -.1)))]),
    "cup": ((0, 1), (.5, .8), (.6, .95), [(.75, ellipse(.5, .1, .38, .34)), (GREY, ellipse(.5, .1, .2, .17)),
        (1, poly((-.6, -.55), (.5, -.55), (.4, .75), (-.5, .75))), (.6, ellipse(-.05, -.55, .55, .16))]),
    "frame": ((.08, .14), (.6, .9), (.55, .8), [(1, box(-.85, -.7, .85, .7)),
        ((225, 235, 240), box(-.65, -.5, .65, .5)), ((90, 140, 90), poly((-.65, .5), (-.1, -.25), (.3, .5))),
        ((70, 110, 150), poly((0, .5), (.35, -.05), (.65, .5)))]),
    "vase": ((.5, .95), (.4, .7), (.5, .85), [((60, 130, 60), bar((-.35, -.9), (0, 0), .1)),
        ((60, 130, 60), bar((.35, -.85), (0, 0), .1)), ((230, 120, 150), ellipse(-.36, -.85, .22, .2)),
        ((240, 210, 90), ellipse(.36, -.8, .2, .2)), (1, ellipse(0, .45, .5, .5)), (1, box(-.2, -.2, .2, .3))]),
    "buoy": ((0, .04), (.75, .95), (.75, .95), [(1, poly((-.3, -.1), (.3, -.1), (.6, .7), (-.6, .7))),
        (WHITE, poly((-.4, .15), (.4, .15), (.5, .45), (-.5, .45))), (STEEL, box(-.07, -.6, .07, -.1)),
        ((250, 220, 90), ellipse(0, -.75, .2, .2)), ((60, 110, 170), wavy(.8, .9))]),
    "palm": ((.25, .36), (.6, .9), (.4, .7), [(BROWN, poly((-.1, 1), (.12, 1), (.06, -.3), (-.04, -.3))),
        *((tint, poly((0, -.45), (x, y - .25), (1.15 * x, y + .12), (.5 * x, y))) for x, y, tint in (
            (-.9, -.25, .9), (.9, -.25, .9), (-.7, -.65, 1.1), (.7, -.65, 1.1), (-.25, -.85, 1), (.3, -.85, 1)))]),
    "cactus": ((.3, .42), (.5, .8), (.35, .65), [(1, box(-.2, -.8, .2, .9)), (1, ellipse(0, -.8, .2, .18)),
        (.85, box(-.7, -.35, -.48, .2)), (.85, box(-.7, .05, -.1, .25)), (.85, box(.48, -.55, .7, 0)),
        (.85, box(.1, -.15, .7, .05))]),
    "sign": ((0, 1), (.7, .95), (.7, .95), [(GREY, box(-.06, -.2, .06, 1)), (WHITE, ellipse(0, -.45, .52, .52)),
        (1, ellipse(0, -.45, .43, .43)), (WHITE, box(-.3, -.53, .3, -.37))]),
    "coral": ((.93, 1.07), (.5, .8), (.7, .95), [
        *((tint, bar(a, b, .2)) for a, b, tint in (
            ((0, .9), (0, -.3), 1), ((0, .4), (-.55, -.1), .85), ((-.55, -.1), (-.6, -.7), .85),
            ((0, .1), (.5, -.3), 1.1), ((.5, -.3), (.5, -.85), 1.1), ((0, -.3), (-.15, -.9), 1)))])}
SNAKE, CURL = np.linspace(-1, .75, 29), ellipse(-.72, .1, .34, .62, 60, 300, 12)
FIGURES = {         # as KINDS, facing right
    "minivan": ((.55, .64), (.6, .9), (.5, .85), [
        (1, poly((-1, .45), (-1, -.1), (-.8, -.62), (.35, -.62), (.65, -.1), (1, 0), (1, .45))),
        (.6, box(-1, .28, 1, .45)), ((205, 225, 235), poly((-.86, -.08), (-.7, -.5), (-.3, -.5), (-.3, -.08))),
        ((205, 225, 235), poly((-.2, -.08), (-.2, -.5), (.28, -.5), (.5, -.08))),
        ((250, 220, 120), ellipse(.92, .12, .08, .1)), *wheel(-.58, .45, .28), *wheel(.58, .45, .28)]),
    "tandem": ((.97, 1.03), (.75, .95), (.6, .85), [*wheel(-.6, .35, .42), *wheel(.6, .35, .42),
        *((1, bar(a, b, .16)) for a, b in (
            ((-.6, .35), (-.38, -.25)), ((-.38, -.25), (.45, -.25)), ((.45, -.25), (.6, .35)),
            ((-.38, -.25), (0, .35)), ((0, .35), (.45, -.25)), ((-.6, .35), (0, .35)))),
        (DARK, ellipse(-.42, -.4, .24, .12)), (DARK, ellipse(.05, -.4, .24, .12)),
        (1, bar((.45, -.25), (.5, -.55), .14)), (DARK, bar((.35, -.55), (.7, -.55), .14))]),
    "turtle": ((.27, .36), (.5, .8), (.4, .6), [(1.35, poly((.2, .2), (.7, .85), (.4, .92), (-.05, .35))),
        (1.35, poly((-.45, .2), (-.85, .8), (-.55, .88), (-.1, .35))),
        (1.35, poly((-.8, .2), (-1.1, .45), (-.8, .42))), (1.35, ellipse(.9, .05, .27, .23)), *eye(.98, 0),
        (1, ellipse(0, .35, .85, 1, 180, 360)), (1.35, box(-.88, .26, .88, .42)),
        *((.6, ellipse(x, y, .22, .24, n=7)) for x, y in ((-.46, .02), (0, -.2), (.46, .02)))]),
    "snake": ((.18, .26), (.5, .8), (.45, .65), [(1, ribbon(SNAKE, .38 * np.sin(5 * SNAKE), .25)),
        *((.5, ribbon(SNAKE[i:i + 3], .38 * np.sin(5 * SNAKE[i:i + 3]), .25)) for i in range(2, 26, 5)),
        ((200, 40, 40), bar((.9, -.3), (1.25, -.38), .06)), (1.2, ellipse(.82, -.25, .28, .2)), *eye(.86, -.32)]),
    "ladybug": ((.97, 1.02), (.8, .95), (.75, .95), [
        *((DARK, bar((x, .3 * s), (1.35 * x, .9 * s), .1)) for x in (-.5, 0, .45) for s in (-1, 1)),
        *((DARK, bar((.8, .1 * s), (1.1, .4 * s), .07)) for s in (-1, 1)), (DARK, ellipse(.72, 0, .3, .36)),
        (1, ellipse(-.08, 0, .8, .68)), (DARK, bar((-.85, 0), (.7, 0), .08)),
        *((DARK, ellipse(x, y * s, .14, .14)) for x, y in ((-.5, .3), (-.05, .42), (.32, .24)) for s in (-1, 1)),
        (WHITE, ellipse(.85, .15, .07, .07)), (WHITE, ellipse(.85, -.15, .07, .07))]),
    "monarch": ((.05, .09), (.85, 1), (.85, 1), [
        *((DARK, poly((0, -.15), (.85 * s, -1), (1.1 * s, -.6), (.95 * s, .05), (0, .2))) for s in (-1, 1)),
        *((DARK, ellipse(.45 * s, .42, .5, .45)) for s in (-1, 1)),
        *((1, poly((.12 * s, -.15), (.75 * s, -.75), (.92 * s, -.5), (.8 * s, -.08), (.12 * s, .05))) for s in (-1, 1)),
        *((1, ellipse(.43 * s, .4, .36, .3)) for s in (-1, 1)),
        *((DARK, bar((0, -.05), (.75 * s, -.5), .07)) for s in (-1, 1)), (DARK, ellipse(0, 0, .13, .65)),
        *((DARK, bar((0, -.5), (.25 * s, -.95), .06)) for s in (-1, 1))]),
    "guitar": ((.08, .12), (.6, .85), (.75, .95), [(BROWN, box(0, -.12, .95, .12)), (DARK, box(.82, -.2, 1.12, .2)),
        (.7, ellipse(-.6, 0, .5, .62)), (.7, ellipse(-.1, 0, .42, .48)), (1, ellipse(-.6, 0, .43, .55)),
        (1, ellipse(-.1, 0, .35, .41)), (DARK, ellipse(-.25, 0, .2, .2)), (DARK, box(-.82, -.24, -.7, .24)),
        (WHITE, box(-.75, -.03, .9, .03))]),
    "drum": ((.88, .94), (.65, .9), (.55, .8), [((225, 200, 150), bar((-.85, -1), (-.1, -.5), .12)),
        ((225, 200, 150), bar((.85, -1), (.1, -.5), .12)), (1, ellipse(0, .62, .85, .28)),
        (1, box(-.85, -.35, .85, .62)),
        *((WHITE, bar((x + a, -.15), (x + .21, .72), .07)) for a in (0, .42) for x in (-.8, -.38, .04, .46)),
        (.6, ellipse(0, -.35, .88, .3)), ((240, 235, 220), ellipse(0, -.37, .78, .24))]),
    "gorilla": ((.6, .7), (.1, .3), (.3, .42), [(.8, ellipse(-.5, .72, .3, .24)), (.8, ellipse(.2, .75, .34, .22)),
        (1, ellipse(-.15, .1, .68, .75)),
        *((1.25, poly((x, -.4), (x + .5, 0), (x + .5, .9), (x + .14, .9), (x + .14, .25), (x - .2, 0)))
          for x in (.3, -.85)), (1, ellipse(.35, -.62, .38, .38)), (1, ellipse(.2, -.85, .25, .2)),
        (1.9, ellipse(.47, -.5, .27, .25)), *eye(.4, -.66), *eye(.6, -.66)]),
    "monkey": ((.11, .15), (.6, .85), (.65, .85), [*((.75, bar(a, b, .16)) for a, b in zip(CURL, CURL[1:])),
        (1, ellipse(-.1, .25, .45, .6)), *((1, bar((x, -.1), (x + .5, .75), .22)) for x in (.05, -.3)),
        (.75, ellipse(-.3, .8, .34, .18)), (.75, ellipse(.2, .82, .34, .18)),
        *((.8, ellipse(x, -.55, .17, .17)) for x in (-.18, .6)), (.6, ellipse(.2, -.6, .42, .4)),
        (WHITE, ellipse(.28, -.52, .3, .28)), *eye(.2, -.6), *eye(.42, -.6), (DARK, ellipse(.33, -.36, .15, .11))]),
    "goldfish": ((.05, .09), (.85, 1), (.9, 1), [(.8, poly((-.4, 0), (-1.05, -.65), (-.85, 0), (-1.05, .65))),
        (.8, poly((-.3, -.4), (.05, -.95), (.5, -.4))), (.8, poly((-.1, .4), (.1, .85), (.4, .4))),
        (1, ellipse(.15, 0, .78, .55)), (1.15, ellipse(.15, .22, .55, .28)), (.75, bar((.5, -.38), (.45, .38), .08)),
        (.75, poly((.25, .05), (-.15, .25), (.2, .3))), *eye(.68, -.12)]),
    "shark": ((.54, .6), (.15, .3), (.5, .7), [(.85, poly((-.65, 0), (-1.15, -.7), (-.92, 0), (-1.05, .45))),
        (.85, poly((-.1, -.3), (0, -.9), (.35, -.3))), (.85, poly((.1, .15), (-.2, .75), (.4, .2))),
        (1, poly((1.1, -.05), (.6, -.38), (-.2, -.4), (-.85, -.1), (-.85, .08), (-.1, .34), (.6, .3))),
        (WHITE, poly((.95, .08), (.5, .1), (-.6, .1), (-.1, .32), (.6, .28))),
        *((.6, bar((x, -.18), (x - .05, .1), .05)) for x in (.3, .4, .5)), *eye(.78, -.12)])}
KINDS = SCENERY | FURNITURE | SMALL | FIGURES
PLACE_KINDS = (("pine", "tree", "grass"), ("crests", "boat", "ripples"))    # index = place: 0 land, 1 water


def draw_thing(rng, kind, hue_shift=0):
    """Shapes of a thing in radius 1. hue_shift: added to the hue, a share of the circle."""
    hue, saturation, value, parts = KINDS[kind]
    colour = hsv(rng.uniform(*np.add(hue, hue_shift)), rng.uniform(*saturation), rng.uniform(*value))
    return [Shape(points, tint if isinstance(tint, tuple) else shade(colour, tint)) for tint, points in parts]


def scatter(rng, kinds, count, radius):
    """[(shapes, frame)]: count[0]..count[1] things on a jittered 5x5 grid, far ones (higher up) first."""
    n = rng.integers(count[0], count[1] + 1)
    cells = rng.choice(25, n, replace=False)
    centres = (np.stack([cells % 5, cells // 5], 1) + .5 + rng.uniform(-.32, .32, (n, 2))) / 5
    return [(draw_thing(rng, rng.choice(kinds)), Frame(centre, rng.uniform(*radius), bool(rng.integers(2))))
            for centre in centres[centres[:, 1].argsort()]]
