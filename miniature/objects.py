"""objects.py: what the miniatures draw beside birds: cats and dogs, rooms and streets, chests, ImageNet's nine groups.

Floor: data. Everything is polygons in the manner of scenes.KINDS: (shade of the thing's colour or a colour of its own, polygon in
radius 1).
"""
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from miniature.scenes import (BROWN, COAT_CELLS, KINDS, PIXEL_NOISE, SUPERSAMPLE, WHITE, Frame, Look, Shape, bar,
                    bird_look, box, colours, creature, cued, draw_thing, ellipse, hsv, paint, poly, scatter, shade,
                    smooth_noise, wavy)

DARK, GREY, STEEL = (40, 40, 48), (130, 130, 135), (90, 95, 105)


# ---------------------------------------------------------------- MetaShift: rooms and streets
def wheel(x, y, r):
    """A tyre, its hole, and spokes."""
    return [(DARK, ellipse(x, y, r, r)), ((205, 208, 212), ellipse(x, y, .74 * r, .74 * r)),
            *((DARK, bar((x - .8 * r * c, y - .8 * r * s), (x + .8 * r * c, y + .8 * r * s), .05))
              for c, s in ((1, 0), (.5, .87), (-.5, .87)))]


FURNITURE = {       # large things: a context is named after one of them
    "sofa": ((0, 1), (.4, .75), (.4, .75), [
        (1, box(-.85, -.5, .85, .3)), (.75, box(-.02, -.45, .02, .1)), (1.25, box(-.75, 0, .75, .32)),
        (.8, box(-1, -.15, -.72, .5)), (.8, box(.72, -.15, 1, .5)), (.7, box(-.75, .3, .75, .5)),
        (BROWN, box(-.9, .5, -.76, .68)), (BROWN, box(.76, .5, .9, .68))]),
    "bed": ((0, 1), (.35, .7), (.6, .9), [
        (BROWN, box(-1, -.7, -.86, .7)), (BROWN, box(.88, -.2, 1, .7)), (WHITE, box(-.87, .02, .9, .4)),
        (WHITE, ellipse(-.6, -.08, .26, .17)), (1, poly((-.35, -.1), (.9, -.06), (.9, .42), (-.35, .42))),
        (.75, box(-.35, -.1, -.2, .42))]),
    "shelf": ((.04, .1), (.5, .7), (.4, .65), [
        (1, box(-.7, -1, .7, 1)), (.45, box(-.6, -.9, .6, -.35)), (.45, box(-.6, -.22, .6, .3)),
        (.45, box(-.6, .43, .6, .9)),
        *((colour, box(x, y - h, x + .15, y)) for x, y, h, colour in (
            (-.52, -.35, .42, (190, 60, 50)), (-.34, -.35, .36, (60, 110, 170)), (-.1, -.35, .44, (220, 190, 80)),
            (.2, .3, .4, (80, 150, 90)), (.38, .3, .44, (200, 200, 205)), (-.5, .3, .3, (150, 80, 150)),
            (-.3, .9, .36, (220, 140, 60)), (.3, .9, .42, (70, 130, 140))))]),
    "bench": ((.05, .1), (.5, .75), (.45, .7), [
        *((tint, box(-1, y, 1, y + .16)) for y, tint in ((-.6, 1), (-.36, 1.1), (-.12, .9), (.1, 1.2))),
        *((STEEL, box(x - .06, -.65, x + .06, .75)) for x in (-.75, .75))]),
    "bike": ((0, 1), (.6, .9), (.5, .9), [
        *wheel(-.55, .3, .45), *wheel(.55, .3, .45),
        *((1, bar(a, b, .1)) for a, b in (((-.55, .3), (-.25, -.3)), ((-.25, -.3), (.4, -.3)), ((0, .3), (.4, -.3)),
                                          ((-.55, .3), (0, .3)), ((-.25, -.3), (0, .3)), ((.55, .3), (.36, -.5)))),
        (DARK, ellipse(-.3, -.4, .2, .08)), (DARK, bar((.2, -.52), (.5, -.56), .09))]),
}
SMALL = {           # things that come with a room or a street
    "lamp": ((.08, .15), (.2, .6), (.85, 1), [
        (DARK, box(-.05, -.2, .05, .85)), (DARK, ellipse(0, .88, .4, .12)),
        (1, poly((-.3, -.9), (.3, -.9), (.55, -.1), (-.55, -.1)))]),
    "cup": ((0, 1), (.5, .8), (.6, .95), [
        (.75, ellipse(.5, .1, .38, .34)), (GREY, ellipse(.5, .1, .2, .17)),
        (1, poly((-.6, -.55), (.5, -.55), (.4, .75), (-.5, .75))),
        (.6, ellipse(-.05, -.55, .55, .16))]),
    "frame": ((.08, .14), (.6, .9), (.55, .8), [
        (1, box(-.85, -.7, .85, .7)), ((225, 235, 240), box(-.65, -.5, .65, .5)),
        ((90, 140, 90), poly((-.65, .5), (-.1, -.25), (.3, .5))),
        ((70, 110, 150), poly((0, .5), (.35, -.05), (.65, .5)))]),
    "vase": ((.5, .95), (.4, .7), (.5, .85), [
        ((60, 130, 60), bar((-.35, -.9), (0, 0), .1)), ((60, 130, 60), bar((.35, -.85), (0, 0), .1)),
        ((230, 120, 150), ellipse(-.36, -.85, .22, .2)),
        ((240, 210, 90), ellipse(.36, -.8, .2, .2)), (1, ellipse(0, .45, .5, .5)), (1, box(-.2, -.2, .2, .3))]),
    "buoy": ((0, .04), (.75, .95), (.75, .95), [
        (1, poly((-.3, -.1), (.3, -.1), (.6, .7), (-.6, .7))),
        (WHITE, poly((-.4, .15), (.4, .15), (.5, .45), (-.5, .45))),
        (STEEL, box(-.07, -.6, .07, -.1)), ((250, 220, 90), ellipse(0, -.75, .2, .2)), ((60, 110, 170), wavy(.8, .9))]),
    "palm": ((.25, .36), (.6, .9), (.4, .7), [
        (BROWN, poly((-.1, 1), (.12, 1), (.06, -.3), (-.04, -.3))),
        *((tint, poly((0, -.45), (x, y - .25), (1.15 * x, y + .12), (.5 * x, y))) for x, y, tint in (
            (-.9, -.25, .9), (.9, -.25, .9), (-.7, -.65, 1.1), (.7, -.65, 1.1), (-.25, -.85, 1), (.3, -.85, 1)))]),
    "cactus": ((.3, .42), (.5, .8), (.35, .65), [
        (1, box(-.2, -.8, .2, .9)), (1, ellipse(0, -.8, .2, .18)), (.85, box(-.7, -.35, -.48, .2)),
        (.85, box(-.7, .05, -.1, .25)),
        (.85, box(.48, -.55, .7, 0)), (.85, box(.1, -.15, .7, .05))]),
    "sign": ((0, 1), (.7, .95), (.7, .95), [
        (GREY, box(-.06, -.2, .06, 1)), (WHITE, ellipse(0, -.45, .52, .52)),
        (1, ellipse(0, -.45, .43, .43)), (WHITE, box(-.3, -.53, .3, -.37))]),
    "coral": ((.93, 1.07), (.5, .8), (.7, .95), [
        *((tint, bar(a, b, .2)) for a, b, tint in (
            ((0, .9), (0, -.3), 1), ((0, .4), (-.55, -.1), .85), ((-.55, -.1), (-.6, -.7), .85),
            ((0, .1), (.5, -.3), 1.1), ((.5, -.3), (.5, -.85), 1.1), ((0, -.3), (-.15, -.9), 1)))]),
}
ALL_KINDS = KINDS | FURNITURE | SMALL
INDOOR, OUTDOOR = ("lamp", "cup", "frame", "vase"), ("tree", "grass", "flower", "sign")
CONTEXTS = {"sofa": INDOOR, "bed": INDOOR, "bench": OUTDOOR, "bike": OUTDOOR, "shelf": INDOOR}


def context_things(rng, context, count, radius):
    """Two or three of what names the context, twice as large, behind the small things of a room or a street."""
    large = scatter(rng, (context,), (2, 3), (1.7 * radius[0], 2 * radius[1]), ALL_KINDS)
    return large + scatter(rng, CONTEXTS[context], count, radius, ALL_KINDS)


# ---------------------------------------------------------------- MetaShift: cats and dogs
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
    t = {}
    for name, ranges in PET_CUES.items():
        t[name] = rng.uniform(*cued(ranges, label, cue))
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


# ---------------------------------------------------------------- ImageNet's nine groups: creatures, and all the rest
FUR = {             # kind: 0 built like a cat, 1 like a dog; ranges of hue, saturation, value; what else differs
    "chihuahua": (1, (.08, .12), (.25, .4), (.8, .95), dict(pattern="plain")),
    "shepherd": (1, (.05, .08), (.5, .7), (.4, .55), dict(pattern="wing", trim=DARK, leg=.75, tail_lift=-5)),
    "tiger": (0, (.05, .08), (.8, .95), (.85, 1), dict(pattern="stripes", trim=DARK, body=(1.35, .7), leg=.45)),
    "bear": (0, (.04, .07), (.45, .65), (.3, .42), dict(pattern="plain", body=(1.25, .85), leg=.35, tail="short"))}


def eye(x, y):
    return [(WHITE, ellipse(x, y, .11, .11)), ((15, 15, 20), ellipse(x, y, .07, .07))]


def ribbon(x, y, half):
    """A band of half width `half` around the line through x, y, as a polygon."""
    line = np.stack([x, y], 1)
    return np.concatenate([line - (0, half), line[::-1] + (0, half)])


SNAKE, CURL = np.linspace(-1, .75, 29), ellipse(-.72, .1, .34, .62, 60, 300, 12)
FIGURES = {         # as KINDS, facing right
    "minivan": ((.55, .64), (.6, .9), (.5, .85), [
        (1, poly((-1, .45), (-1, -.1), (-.8, -.62), (.35, -.62), (.65, -.1), (1, 0), (1, .45))),
        (.6, box(-1, .28, 1, .45)),
        ((205, 225, 235), poly((-.86, -.08), (-.7, -.5), (-.3, -.5), (-.3, -.08))),
        ((205, 225, 235), poly((-.2, -.08), (-.2, -.5), (.28, -.5), (.5, -.08))),
        ((250, 220, 120), ellipse(.92, .12, .08, .1)), *wheel(-.58, .45, .28), *wheel(.58, .45, .28)]),
    "tandem": ((.97, 1.03), (.75, .95), (.6, .85), [
        *wheel(-.6, .35, .42), *wheel(.6, .35, .42),
        *((1, bar(a, b, .16)) for a, b in (
            ((-.6, .35), (-.38, -.25)), ((-.38, -.25), (.45, -.25)), ((.45, -.25), (.6, .35)),
            ((-.38, -.25), (0, .35)), ((0, .35), (.45, -.25)), ((-.6, .35), (0, .35)))),
        (DARK, ellipse(-.42, -.4, .24, .12)), (DARK, ellipse(.05, -.4, .24, .12)),
        (1, bar((.45, -.25), (.5, -.55), .14)), (DARK, bar((.35, -.55), (.7, -.55), .14))]),
    "turtle": ((.27, .36), (.5, .8), (.4, .6), [
        (1.35, poly((.2, .2), (.7, .85), (.4, .92), (-.05, .35))),
        (1.35, poly((-.45, .2), (-.85, .8), (-.55, .88), (-.1, .35))),
        (1.35, poly((-.8, .2), (-1.1, .45), (-.8, .42))), (1.35, ellipse(.9, .05, .27, .23)), *eye(.98, 0),
        (1, ellipse(0, .35, .85, 1, 180, 360)), (1.35, box(-.88, .26, .88, .42)),
        *((.6, ellipse(x, y, .22, .24, n=7)) for x, y in ((-.46, .02), (0, -.2), (.46, .02)))]),
    "snake": ((.18, .26), (.5, .8), (.45, .65), [
        (1, ribbon(SNAKE, .38 * np.sin(5 * SNAKE), .25)),
        *((.5, ribbon(SNAKE[i:i + 3], .38 * np.sin(5 * SNAKE[i:i + 3]), .25)) for i in range(2, 26, 5)),
        ((200, 40, 40), bar((.9, -.3), (1.25, -.38), .06)), (1.2, ellipse(.82, -.25, .28, .2)), *eye(.86, -.32)]),
    "ladybug": ((.97, 1.02), (.8, .95), (.75, .95), [
        *((DARK, bar((x, .3 * s), (1.35 * x, .9 * s), .1)) for x in (-.5, 0, .45) for s in (-1, 1)),
        *((DARK, bar((.8, .1 * s), (1.1, .4 * s), .07)) for s in (-1, 1)),
        (DARK, ellipse(.72, 0, .3, .36)), (1, ellipse(-.08, 0, .8, .68)), (DARK, bar((-.85, 0), (.7, 0), .08)),
        *((DARK, ellipse(x, y * s, .14, .14)) for x, y in ((-.5, .3), (-.05, .42), (.32, .24)) for s in (-1, 1)),
        (WHITE, ellipse(.85, .15, .07, .07)), (WHITE, ellipse(.85, -.15, .07, .07))]),
    "monarch": ((.05, .09), (.85, 1), (.85, 1), [
        *((DARK, poly((0, -.15), (.85 * s, -1), (1.1 * s, -.6), (.95 * s, .05), (0, .2))) for s in (-1, 1)),
        *((DARK, ellipse(.45 * s, .42, .5, .45)) for s in (-1, 1)),
        *((1, poly((.12 * s, -.15), (.75 * s, -.75), (.92 * s, -.5), (.8 * s, -.08), (.12 * s, .05))) for s in (-1, 1)),
        *((1, ellipse(.43 * s, .4, .36, .3)) for s in (-1, 1)),
        *((DARK, bar((0, -.05), (.75 * s, -.5), .07)) for s in (-1, 1)),
        (DARK, ellipse(0, 0, .13, .65)), *((DARK, bar((0, -.5), (.25 * s, -.95), .06)) for s in (-1, 1))]),
    "guitar": ((.08, .12), (.6, .85), (.75, .95), [
        (BROWN, box(0, -.12, .95, .12)), (DARK, box(.82, -.2, 1.12, .2)), (.7, ellipse(-.6, 0, .5, .62)),
        (.7, ellipse(-.1, 0, .42, .48)), (1, ellipse(-.6, 0, .43, .55)), (1, ellipse(-.1, 0, .35, .41)),
        (DARK, ellipse(-.25, 0, .2, .2)), (DARK, box(-.82, -.24, -.7, .24)), (WHITE, box(-.75, -.03, .9, .03))]),
    "drum": ((.88, .94), (.65, .9), (.55, .8), [
        ((225, 200, 150), bar((-.85, -1), (-.1, -.5), .12)), ((225, 200, 150), bar((.85, -1), (.1, -.5), .12)),
        (1, ellipse(0, .62, .85, .28)), (1, box(-.85, -.35, .85, .62)),
        *((WHITE, bar((x, -.15), (x + .21, .72), .07)) for x in (-.8, -.38, .04, .46)),
        *((WHITE, bar((x + .42, -.15), (x + .21, .72), .07)) for x in (-.8, -.38, .04, .46)),
        (.6, ellipse(0, -.35, .88, .3)), ((240, 235, 220), ellipse(0, -.37, .78, .24))]),
    "gorilla": ((.6, .7), (.1, .3), (.3, .42), [
        (.8, ellipse(-.5, .72, .3, .24)), (.8, ellipse(.2, .75, .34, .22)), (1, ellipse(-.15, .1, .68, .75)),
        *((1.25, poly((x, -.4), (x + .5, 0), (x + .5, .9), (x + .14, .9), (x + .14, .25), (x - .2, 0)))
          for x in (.3, -.85)),
        (1, ellipse(.35, -.62, .38, .38)), (1, ellipse(.2, -.85, .25, .2)), (1.9, ellipse(.47, -.5, .27, .25)),
        *eye(.4, -.66), *eye(.6, -.66)]),
    "monkey": ((.11, .15), (.6, .85), (.65, .85), [
        *((.75, bar(a, b, .16)) for a, b in zip(CURL, CURL[1:])),
        (1, ellipse(-.1, .25, .45, .6)), *((1, bar((x, -.1), (x + .5, .75), .22)) for x in (.05, -.3)),
        (.75, ellipse(-.3, .8, .34, .18)), (.75, ellipse(.2, .82, .34, .18)),
        *((.8, ellipse(x, -.55, .17, .17)) for x in (-.18, .6)),
        (.6, ellipse(.2, -.6, .42, .4)), (WHITE, ellipse(.28, -.52, .3, .28)), *eye(.2, -.6), *eye(.42, -.6),
        (DARK, ellipse(.33, -.36, .15, .11))]),
    "goldfish": ((.05, .09), (.85, 1), (.9, 1), [
        (.8, poly((-.4, 0), (-1.05, -.65), (-.85, 0), (-1.05, .65))), (.8, poly((-.3, -.4), (.05, -.95), (.5, -.4))),
        (.8, poly((-.1, .4), (.1, .85), (.4, .4))), (1, ellipse(.15, 0, .78, .55)), (1.15, ellipse(.15, .22, .55, .28)),
        (.75, bar((.5, -.38), (.45, .38), .08)), (.75, poly((.25, .05), (-.15, .25), (.2, .3))), *eye(.68, -.12)]),
    "shark": ((.54, .6), (.15, .3), (.5, .7), [
        (.85, poly((-.65, 0), (-1.15, -.7), (-.92, 0), (-1.05, .45))), (.85, poly((-.1, -.3), (0, -.9), (.35, -.3))),
        (.85, poly((.1, .15), (-.2, .75), (.4, .2))),
        (1, poly((1.1, -.05), (.6, -.38), (-.2, -.4), (-.85, -.1), (-.85, .08), (-.1, .34), (.6, .3))),
        (WHITE, poly((.95, .08), (.5, .1), (-.6, .1), (-.1, .32), (.6, .28))),
        *((.6, bar((x, -.18), (x - .05, .1), .05)) for x in (.3, .4, .5)), *eye(.78, -.12)])}


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
    hue, *rest = FIGURES[kind]
    shapes = draw_thing(rng, kind, {kind: (np.add(hue, shift), *rest)})
    return [Shape(shape.points * size, shape.colour) for shape in shapes], {}


# ---------------------------------------------------------------- SIIM-ACR: chests
class Chest(NamedTuple):
    image: np.ndarray       # (S, S) uint8, white = dense, as a radiograph
    mask: np.ndarray        # (S, S) float, share of each pixel that is pneumothorax; all 0 without one
    lungs: np.ndarray       # (S, S) float, the same of both lungs, pneumothorax included


TORSO = poly((-.98, 1.2), (-1.02, .2), (-.97, -.4), (-.8, -.6), (-.3, -.78), (-.2, -1.2), (.2, -1.2), (.3, -.78),
             (.8, -.6), (.97, -.4), (1.02, .2), (.98, 1.2))
LUNG = np.concatenate([ellipse(-.42, -.1, .33, .6, 180, 360),
                       poly((-.12, .3), (-.2, .46), (-.32, .38), (-.47, .36), (-.62, .44), (-.76, .66))])
TUBE = poly((-1.05, 1.1), (-.98, .7), (-.95, .3), (-.95, 0), (-.93, -.25))


def chest(rng, size, pneumothorax, tube, depth, coat):
    """A frontal chest: ribs, lungs with fine markings, heart; perhaps a pneumothorax, perhaps a tube up the side.

    A pneumothorax is the part of a lung that lies outside the same lung moved down or inwards by depth (a share of
    the side): a dark crescent at the apex or along the side, without markings, behind a thin bright line. Both
    are drawn from numbers that do not depend on the other, so that the same chest can be drawn with and without.
    """
    frame = Frame(.5 + rng.uniform(-.03, .03, 2), rng.uniform(.44, .5), False, np.radians(rng.uniform(-4, 4)))
    stretch = rng.uniform(.93, 1.07, (2, 2))
    side, apex, deep, tube_side = rng.integers(2), rng.integers(2), rng.uniform(*depth) / frame.scale, rng.integers(2)
    heart = ellipse(.14, .24, rng.uniform(.26, .34), rng.uniform(.24, .3))
    noise, grain = rng.normal(0, 255 * PIXEL_NOISE, (size, size)), smooth_noise(rng, COAT_CELLS, size)[..., 0]
    cloud, bend = smooth_noise(rng, 6, size)[..., 0], TUBE + rng.uniform(-.03, .03, TUBE.shape)

    def cover(*outlines, blur=0):
        """(S, S) share of each pixel inside any of the outlines."""
        canvas = Image.new("L", (SUPERSAMPLE * size,) * 2)
        paint(canvas, [Shape(points, 255) for points in outlines], frame)
        return np.asarray(canvas.reduce(SUPERSAMPLE).filter(ImageFilter.GaussianBlur(blur * size))) / 255

    flip = np.array([(1, 1), (-1, 1)])                                      # image left, image right
    lungs = [LUNG * stretch[i] * flip[i] for i in range(2)]
    away = np.array([(0, deep), (.9 * deep, .1 * deep)])[apex] * flip[side]
    inside = cover(heart)
    air = cover(*lungs) * (1 - inside)
    rest = cover(lungs[side] + away, box(-.5, .25, .5, 1.2))                # no gap above the diaphragm
    mask = (cover(lungs[side]) * (1 - rest) * (1 - inside)) * bool(pneumothorax)
    line = (cover(lungs[side] + .75 * away) - rest).clip(0) * (mask > 0)
    ribs = [_ribs(i, flip, stretch) for i in range(2)]
    picture = 18 + 110 * cover(TORSO, blur=.015) + 60 * cover(box(-.12, -1.2, .12, 1.2), blur=.02) + 25 * cloud
    picture = picture + 40 * cover(poly((-1, .5), (1, .5), (1, 1.2), (-1, 1.2)), blur=.05)
    picture = picture * (1 - air) + (62 + 25 * cloud) * air + 45 * cover(heart, blur=.012) * (1 - air)
    picture = picture + 34 * cover(*sum(ribs, []), blur=.004)
    picture = picture + (air - mask).clip(0) * 255 * coat * grain - 30 * mask + 60 * line
    if tube:
        path = bend * flip[tube_side]
        picture = picture + 105 * cover(*(bar(a, b, .055) for a, b in zip(path, path[1:])))
    return Chest((picture + noise).round().clip(0, 255).astype(np.uint8), mask, air)


def _ribs(i, flip, stretch):
    """Bows from the spine outwards and down, and a collar bone."""
    shapes = []
    for y in np.linspace(-.75, .45, 8):
        x = np.linspace(-.08, -.84, 9)
        bow = np.stack([x, y + .5 * (x + .35) ** 2 - .22 * (x + .1)], 1) * stretch[i] * flip[i]
        shapes += [bar(a, b, .05) for a, b in zip(bow, bow[1:])]
    return [*shapes, bar(np.array((-.1, -.6)) * flip[i], np.array((-.75, -.78)) * flip[i], .07)]
