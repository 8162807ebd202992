"""Procedural picture worlds: endless, seeded pairs of a hint and a picture, with caption and ground truth.

- `fill50k`, after the published training example of ControlNet (lllyasviel/ControlNet, docs/train.md): the hint is a
  thin white circle on black, the picture a flat disc on a flat ground; circles may leave the frame.
- `people`: a cartoon person in a free pose; the hint is its skeleton as OpenPose draws it.
- `shapes`: one to three overlapping circles, squares, triangles and stars; the hint is their Canny edges.
- `edges`: shapes and people in turn, with Canny edges as hints for both.

Sample i of a world and a seed is always the same picture, whatever was drawn before it. A held-out world has none of
the pictures that the worlds for training have, whatever their seeds.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from PIL import Image, ImageDraw

from .colours import COLOURS
from .hints.canny import canny
from .hints.pose import draw_pose

SUPERSAMPLING = 4
EDGE_THRESHOLDS = (50, 100)  # of Canny: half the usual, so that neighbours of 25 levels of gray are told apart


@dataclass(frozen=True)
class Sample:
    """One picture with its hint, both uint8 (H, W, 3), and the truth that a world knows of it, a folder does not:

    `mask` bool (H, W): where the object is. `keypoints` float (18, 2), x and y in pixels, in the order of COCO-18: of
    people only.
    """

    image: np.ndarray
    hint: np.ndarray
    caption: str
    mask: np.ndarray | None = None
    keypoints: np.ndarray | None = None


class World:
    """What the worlds share: the side of their pictures in pixels, the colours they use, and their random numbers."""

    name: str

    def __init__(
        self, size: int = 128, seed: int = 0, colours: tuple[str, ...] = tuple(COLOURS), held_out: bool = False
    ):
        self.size, self.seed, self.colours = size, seed, colours
        self.stream = zlib.crc32(f"{self.name} held out".encode() if held_out else self.name.encode())

    def rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng([self.stream, self.seed, index])


# ------------------------------------------------------------------------------------------------------------ fill50k


class Fill50k(World):
    """Captions: '<colour> circle with <colour> background'."""

    name = "fill50k"

    def __getitem__(self, index: int) -> Sample:
        rng = self.rng(index)
        disc, ground = rng.choice(self.colours, size=2, replace=False)
        x, y = rng.uniform(0.1, 0.9, size=2) * self.size
        radius = rng.uniform(0.08, 0.4) * self.size
        return draw_circle(self.size, x, y, radius, str(disc), str(ground))


def draw_circle(size: int, x: float, y: float, radius: float, disc: str, ground: str) -> Sample:
    """A disc at pixel (x, y), anti-aliased, and as the hint its outline, 1.5 pixels wide, at 512 two."""
    rows, columns = np.mgrid[:size, :size] + 0.5
    distance = np.hypot(columns - x, rows - y) - radius  # (H, W), negative inside
    inside = np.clip(0.5 - distance, 0, 1)[..., None]  # share of the pixel that the disc covers
    image = inside * COLOURS[disc] + (1 - inside) * np.array(COLOURS[ground])
    line = np.clip(0.5 + max(1.5, size / 256) / 2 - np.abs(distance), 0, 1)
    return Sample(
        image=np.rint(image).astype(np.uint8),
        hint=np.rint(255 * line).astype(np.uint8)[..., None].repeat(3, axis=2),
        caption=f"{disc} circle with {ground} background",
        mask=distance < 0,
    )


# ------------------------------------------------------------------------------------------------------------- shapes


class Shapes(World):
    """Captions: 'red circle with white background', 'red circle, blue square and lime star with white background'."""

    name = "shapes"

    def __getitem__(self, index: int) -> Sample:
        rng = self.rng(index)
        kinds = rng.choice(tuple(OUTLINES), size=rng.integers(1, 4))
        ground, *colours = told_apart(rng, self.colours, 1 + len(kinds))
        canvas = Canvas(self.size, ground)
        for kind, colour in zip(kinds, colours, strict=True):
            radius = rng.uniform(0.14, 0.34 if len(kinds) == 1 else 0.26)
            centre = rng.uniform(radius / 2, 1 - radius / 2, size=2)
            canvas.polygon(centre + radius * rotated(OUTLINES[kind], rng.uniform(0, 2 * np.pi)), COLOURS[colour])
        image, mask = canvas.finish()
        names = [f"{colour} {kind}" for colour, kind in zip(colours, kinds, strict=True)]
        listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
        return Sample(image, edges(image), f"{listed} with {ground} background", mask)


def star(points: int, inner: float) -> np.ndarray:
    """The corners (2 points, 2) of a star with its tips at radius 1 and the corners between them at `inner`."""
    angles = np.arange(2 * points) * np.pi / points
    radii = np.where(np.arange(2 * points) % 2, inner, 1.0)
    return radii[:, None] * np.stack([np.sin(angles), -np.cos(angles)], axis=1)


OUTLINES = {"circle": star(36, 1.0), "square": star(2, 1.0), "triangle": star(3, 0.5), "star": star(5, 0.45)}


def rotated(points: np.ndarray, angle: float) -> np.ndarray:
    """Points (N, 2) turned around the origin; x goes right and y down, so a positive angle turns clockwise."""
    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([[c, s], [-s, c]])


# ------------------------------------------------------------------------------------------------------------- people


class People(World):
    """Captions: 'person in <colour> shirt and <colour> trousers with <colour> background'.

    The skin is of one of a few tones, and hair and shoes are dark: the caption does not tell them.
    """

    name = "people"

    def __getitem__(self, index: int) -> Sample:
        rng = self.rng(index)
        ground, shirt, trousers = told_apart(rng, self.colours, 3)
        keypoints = free_pose(rng)
        skins = [skin for skin in SKINS if distance(skin, COLOURS[ground]) >= 60]  # so that hands and face are seen
        skin = skins[rng.integers(len(skins))]
        image, mask = draw_person(self.size, keypoints, skin, shirt, trousers, ground)
        caption = f"person in {shirt} shirt and {trousers} trousers with {ground} background"
        keypoints = keypoints * self.size
        return Sample(image, draw_pose(keypoints, (self.size, self.size)), caption, mask, keypoints)


SKINS = ((255, 219, 172), (224, 172, 105), (141, 85, 36))  # any ground is 60 or more away from one of them
DARK = (40, 32, 32)  # hair, eyes and shoes

# In parts of the person's height. Arms and legs are a chain of two bones each.
HEAD_RADIUS, NECK, TORSO, SHOULDER, HIP = 0.085, 0.115, 0.29, 0.105, 0.065
UPPER_ARM, FOREARM, THIGH, SHIN = 0.16, 0.15, 0.22, 0.21
ARM_WIDTH, LEG_WIDTH = 0.062, 0.085


def free_pose(rng: np.random.Generator) -> np.ndarray:
    """COCO-18 keypoints (18, 2) of a person that faces us, wholly in the picture, whose side is 1."""
    lean = rng.normal(0, 0.12)
    bones = np.zeros((18, 2))  # the neck at the origin, y down; 'right' is the person's own
    down = np.array([np.sin(-lean), np.cos(lean)])
    across = np.array([-down[1], down[0]])  # towards the person's right: our left
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
        bones[eye] = head + HEAD_RADIUS * (0.2 * up + 0.4 * side * out)
        bones[ear] = head + HEAD_RADIUS * (0.05 * up + side * out)

    height = rng.uniform(0.72, 0.98)
    low = np.minimum(bones.min(axis=0), head - 1.2 * HEAD_RADIUS) - LEG_WIDTH / 2
    high = bones.max(axis=0) + LEG_WIDTH / 2
    height = min(height, 0.98 / (high - low).max())
    corner = rng.uniform(0, 1 - height * (high - low))
    return corner + height * (bones - low)


def towards(side: int, angle: float) -> np.ndarray:
    """The unit vector at `angle` from straight down, turning outwards to the person's right (1) or left (-1)."""
    return np.array([-side * np.sin(angle), np.cos(angle)])


def draw_person(
    size: int, keypoints: np.ndarray, skin: tuple[int, int, int], shirt: str, trousers: str, ground: str
) -> tuple[np.ndarray, np.ndarray]:
    """-> image uint8 (H, W, 3) and mask bool (H, W) from keypoints (18, 2) in parts of the side."""
    nose, neck, r_shoulder, r_elbow, r_wrist, l_shoulder, l_elbow, l_wrist = keypoints[:8]
    r_hip, r_knee, r_ankle, l_hip, l_knee, l_ankle = keypoints[8:14]
    scale = np.linalg.norm((r_hip + l_hip) / 2 - neck) / TORSO  # the person's height
    shirt, trousers = COLOURS[shirt], COLOURS[trousers]
    canvas = Canvas(size, ground)
    for hip, knee, ankle in ((r_hip, r_knee, r_ankle), (l_hip, l_knee, l_ankle)):
        canvas.limb((hip, knee, ankle), LEG_WIDTH * scale, trousers)
        canvas.disc(ankle, 0.58 * LEG_WIDTH * scale, DARK)
    canvas.limb((r_hip, l_hip), 1.1 * LEG_WIDTH * scale, trousers)
    canvas.polygon(np.stack([r_shoulder, l_shoulder, l_hip, r_hip]), shirt)
    canvas.limb((r_shoulder, r_hip, l_hip, l_shoulder, r_shoulder), 0.045 * scale, shirt)
    canvas.limb((neck, nose), 0.05 * scale, skin)
    for shoulder, elbow, wrist in ((r_shoulder, r_elbow, r_wrist), (l_shoulder, l_elbow, l_wrist)):
        canvas.limb((shoulder, elbow, wrist), ARM_WIDTH * scale, shirt)
        canvas.disc(wrist, 0.62 * ARM_WIDTH * scale, skin)
    radius = HEAD_RADIUS * scale
    r_ear, l_ear = keypoints[16:]
    head = (r_ear + l_ear) / 2
    up = (head - neck) / np.linalg.norm(head - neck)
    canvas.disc(head + 0.2 * radius * up, 1.08 * radius, DARK)
    canvas.disc(head - 0.1 * radius * up, 0.92 * radius, skin)
    for eye in keypoints[14:16]:
        canvas.disc(eye, 0.16 * radius, DARK)
    return canvas.finish()


class InTurn:
    """Several worlds in turn: of n worlds, sample i is sample i // n of world i % n."""

    def __init__(self, worlds: Sequence[World]):
        self.worlds, self.size = worlds, worlds[0].size

    def __getitem__(self, index: int) -> Sample:
        turn, world = divmod(index, len(self.worlds))
        return self.worlds[world][turn]


class Edges(InTurn):
    name = "edges"

    def __init__(self, *args, **kwargs):
        super().__init__([Shapes(*args, **kwargs), People(*args, **kwargs)])

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        return replace(sample, hint=edges(sample.image))


WORLDS = {world.name: world for world in (Fill50k, People, Shapes, Edges)}

# World -> the hint in assets/ that is like its own, and the small ControlNet in weights/ that learned them.
EXAMPLE_OF = {"fill50k": "circle.png", "people": "pose.png", "shapes": "canny.png", "edges": "canny.png"}
TINY_CONTROL_OF = {"fill50k": "tiny-fill50k", "people": "tiny-pose", "edges": "tiny-canny"}


# --------------------------------------------------------------------------------------------------------- drawing


class Canvas:
    """A picture of flat colours under construction, four times too large; coordinates are parts of its side."""

    def __init__(self, size: int, ground: str):
        self.side = size * SUPERSAMPLING
        self.image = Image.new("RGB", (self.side, self.side), COLOURS[ground])
        self.mask = Image.new("L", (self.side, self.side))
        self.layers = ((ImageDraw.Draw(self.image), None), (ImageDraw.Draw(self.mask), 255))

    def polygon(self, corners: np.ndarray, colour: tuple[int, int, int]) -> None:
        points = [tuple(corner) for corner in corners * self.side]
        for draw, fill in self.layers:
            draw.polygon(points, fill=fill or colour)

    def disc(self, centre: np.ndarray, radius: float, colour: tuple[int, int, int]) -> None:
        box = [*((centre - radius) * self.side), *((centre + radius) * self.side)]
        for draw, fill in self.layers:
            draw.ellipse(box, fill=fill or colour)

    def limb(self, joints: tuple[np.ndarray, ...], width: float, colour: tuple[int, int, int]) -> None:
        """A line with round corners and ends."""
        points = [tuple(joint * self.side) for joint in joints]
        for draw, fill in self.layers:
            draw.line(points, fill=fill or colour, width=round(width * self.side))
        for joint in joints:
            self.disc(joint, width / 2, colour)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """-> image uint8 (H, W, 3), smooth at its edges, and mask bool (H, W): what was drawn on."""
        return np.array(self.image.reduce(SUPERSAMPLING)), np.array(self.mask.reduce(SUPERSAMPLING)) > 127


def edges(image: np.ndarray) -> np.ndarray:
    """The Canny edges of uint8 (H, W, 3) as a hint of that shape."""
    return canny(image, *EDGE_THRESHOLDS)[..., None].repeat(3, axis=2)


def told_apart(rng: np.random.Generator, names: tuple[str, ...], count: int) -> list[str]:
    """`count` colours that can be told from each other by eye and, by 30 levels of gray, by an edge detector."""
    while True:
        chosen = [str(name) for name in rng.choice(names, size=count, replace=False)]
        pairs = [(COLOURS[a], COLOURS[b]) for a, b in combinations(chosen, 2)]
        if all(distance(a, b) >= 80 and abs(luma(a) - luma(b)) >= 30 for a, b in pairs):
            return chosen


def distance(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    return float(np.linalg.norm(np.subtract(a, b)))


def luma(colour: tuple[int, int, int]) -> float:
    return float(np.dot(colour, (0.299, 0.587, 0.114)))
