"""`people`: a cartoon person in a random pose; the hint is its skeleton as OpenPose draws it."""

from collections.abc import Iterable

import numpy as np

from controlnet.hints.pose import draw_pose

from .canvas import RGB, Canvas
from .colours import COLOURS
from .person import (
    FOREARM,
    HAIR,
    HAIR_STYLES,
    HATS,
    HEAD_RADIUS,
    HIP,
    NECK,
    REACH,
    SHIN,
    SHOES,
    SHOULDER,
    SKINS,
    THIGH,
    TORSO,
    UPPER_ARM,
    Looks,
    draw_person,
)
from .world import Picture, World, distance, distinct_colours


class People(World):
    """Captions: mostly 'person in <colour> shirt and <colour> trousers with <colour> background', and sometimes with
    hair and hat: 'person with long red hair and a cap in ...'. None mentions the skin or the shoes."""

    name = "people"

    def draw(self, index: int) -> Picture:
        rng = self.rng(index)
        ground, shirt, trousers = distinct_colours(rng, self.colours, 3)
        pose = random_pose(rng)
        looks = random_looks(rng, shirt, trousers, COLOURS[ground])
        canvas = Canvas(self.size, COLOURS[ground])
        draw_person(canvas, pose, looks)
        image, labels = canvas.finish()
        return Picture(image, caption(rng, looks, ground), labels, labels > 0, keypoints=pose * self.size)

    def hint(self, index: int, picture: Picture) -> np.ndarray:
        return draw_pose(picture.keypoints, (self.size, self.size))


def random_looks(rng: np.random.Generator, shirt: str, trousers: str, ground: RGB) -> Looks:
    """Skin, hair and shoes can be told from the background, and the hair from the skin."""

    def one_of(colours: Iterable[RGB], *others: RGB) -> RGB:
        unlike = [colour for colour in colours if all(distance(colour, other) >= 60 for other in others)]
        return unlike[rng.integers(len(unlike))]

    skin = one_of(SKINS, ground)
    hair = one_of(HAIR.values(), ground, skin)
    style = str(rng.choice(HAIR_STYLES, p=(0.32, 0.26, 0.16, 0.14, 0.12)))
    hat = str(rng.choice(HATS)) if rng.random() < 0.3 and style != "bun" else ""
    return Looks(
        shirt,
        trousers,
        skin,
        shoes=one_of(SHOES, ground),
        hair=next(name for name, colour in HAIR.items() if colour == hair),
        style=style,
        hat=hat,
        cap=shirt if rng.random() < 0.5 else trousers,
        short_sleeves=bool(rng.random() < 0.3),
    )


def caption(rng: np.random.Generator, looks: Looks, ground: str) -> str:
    """Most captions leave hair and hat out; the others name what there is of them, but not short hair under a hat."""
    person = "person"
    if rng.random() < 0.35:
        style = looks.style if looks.style in ("long", "curly") and rng.random() < 0.5 else ""
        hidden = looks.style == "bald" or (looks.style == "short" and looks.hat)
        told = [] if hidden else [f"{style} {looks.hair} hair".strip()]
        told += ["a hat" if rng.random() < 0.4 else f"a {looks.hat}"] if looks.hat else []
        rng.shuffle(told)
        person = f"person with {' and '.join(told)}" if told else "bald person"
    return f"{person} in {looks.shirt} shirt and {looks.trousers} trousers with {ground} background"


def random_pose(rng: np.random.Generator) -> np.ndarray:
    """COCO-18 keypoints (18, 2) of a person who faces the viewer, completely inside an image of side 1."""
    lean = rng.normal(0, 0.12)
    bones = np.zeros((18, 2))  # the neck at the origin, y down; "right" is the person's own right
    down = np.array([np.sin(-lean), np.cos(lean)])
    across = np.array([-down[1], down[0]])  # towards the person's right, the viewer's left
    hips = TORSO * down
    for side, shoulder, hip in ((1, 2, 8), (-1, 5, 11)):
        bones[shoulder] = side * SHOULDER * across + 0.02 * down
        bones[hip] = hips + side * HIP * across
        arm = rng.uniform(0.1, 2.7)  # 0: straight down, pi: straight up
        bones[shoulder + 1] = bones[shoulder] + UPPER_ARM * towards(side, arm - side * lean)
        bones[shoulder + 2] = bones[shoulder + 1] + FOREARM * towards(side, arm - side * lean + rng.uniform(-0.6, 1.6))
        leg = rng.uniform(-0.02, 0.75)
        bones[hip + 1] = bones[hip] + THIGH * towards(side, leg)
        bones[hip + 2] = bones[hip + 1] + SHIN * towards(side, leg - rng.uniform(0, 0.6))
    nod = lean + rng.normal(0, 0.12)
    up = np.array([np.sin(nod), -np.cos(nod)])
    head, out = NECK * up, np.array([up[1], -up[0]])
    bones[0] = head - 0.1 * HEAD_RADIUS * up
    for side, eye, ear in ((1, 14, 16), (-1, 15, 17)):
        bones[eye] = head + HEAD_RADIUS * (0.1 * up + 0.4 * side * out)
        bones[ear] = head + HEAD_RADIUS * side * out

    height = rng.uniform(0.72, 0.98)
    hat = head + 2 * HEAD_RADIUS * up
    low = np.minimum(bones.min(axis=0), hat + REACH) - REACH
    high = bones.max(axis=0) + REACH
    height = min(height, 0.98 / (high - low).max())
    corner = rng.uniform(0, 1 - height * (high - low))
    return corner + height * (bones - low)


def towards(side: int, angle: float) -> np.ndarray:
    """The unit vector at `angle` from straight down, outwards to the person's right (`side` 1) or left (-1)."""
    return np.array([-side * np.sin(angle), np.cos(angle)])
