"""Draws a cartoon person in a pose: face, hair, hat, hands and shoes."""

from dataclasses import dataclass

import numpy as np

from .canvas import RGB, Canvas, Points, closed_curve
from .colours import COLOURS

SKINS = ((255, 219, 172), (224, 172, 105), (141, 85, 36))  # every background is 60 or more from one of them
HAIR = {
    "black": (44, 36, 40),
    "brown": (112, 68, 40),
    "blond": (238, 200, 96),
    "red": (196, 78, 36),
    "gray": (164, 164, 172),
}
HAIR_STYLES = ("short", "long", "curly", "bun", "bald")
HATS = ("cap", "top hat", "straw hat")
SHOES = ((40, 32, 32), (236, 232, 224), (150, 60, 44))
DARK, LIPS, STRAW = (40, 32, 32), (188, 62, 62), (236, 200, 112)  # DARK: of eyes and top hats

# As fractions of the person's height. Each arm and leg is a chain of two bones.
HEAD_RADIUS, NECK, TORSO, SHOULDER, HIP = 0.095, 0.122, 0.29, 0.105, 0.065
UPPER_ARM, FOREARM, THIGH, SHIN = 0.16, 0.15, 0.22, 0.21
ARM_WIDTH, LEG_WIDTH = 0.062, 0.085
REACH = 0.07  # of hands, shoes and brims beyond the keypoints


@dataclass(frozen=True)
class Looks:
    """Colours of clothes are names; `hat` is "" for none, and only caps have a colour of their own."""

    shirt: str
    trousers: str
    skin: RGB
    shoes: RGB
    hair: str
    style: str
    hat: str
    cap: str
    short_sleeves: bool


def draw_person(canvas: Canvas, keypoints: np.ndarray, looks: Looks) -> None:
    """Draws a person with keypoints (18, 2), as fractions of the image's side.

    The labels are 1 for hair behind the shoulders, 2 for the legs, 3 for shirt and arms, 4 for the head.
    """
    nose, neck, r_shoulder, r_elbow, r_wrist, l_shoulder, l_elbow, l_wrist = keypoints[:8]
    r_hip, r_knee, r_ankle, l_hip, l_knee, l_ankle = keypoints[8:14]
    scale = np.linalg.norm((r_hip + l_hip) / 2 - neck) / TORSO  # the person's height
    shirt, trousers = COLOURS[looks.shirt], COLOURS[looks.trousers]
    head = Head(canvas, keypoints)
    if looks.style == "long":
        head.blob(
            [(-1.12, 0.4), (0, 1.1), (1.12, 0.4), (1.2, -1.3), (0.6, -1.55), (-0.6, -1.55), (-1.2, -1.3)],
            HAIR[looks.hair],
        )
    canvas.label = 2
    for side, hip, knee, ankle in ((-1, r_hip, r_knee, r_ankle), (1, l_hip, l_knee, l_ankle)):
        canvas.limb((hip, knee, ankle), LEG_WIDTH * scale, trousers)
        draw_shoe(canvas, knee, ankle, side, scale, looks.shoes)
    canvas.limb((r_hip, l_hip), 1.1 * LEG_WIDTH * scale, trousers)
    canvas.label = 3
    canvas.polygon(np.stack([r_shoulder, l_shoulder, l_hip, r_hip]), shirt)
    canvas.limb((r_shoulder, r_hip, l_hip, l_shoulder, r_shoulder), 0.05 * scale, shirt)
    canvas.limb((neck, nose), 0.055 * scale, looks.skin)
    for side, shoulder, elbow, wrist in ((-1, r_shoulder, r_elbow, r_wrist), (1, l_shoulder, l_elbow, l_wrist)):
        draw_hand(canvas, elbow, wrist, side, scale, looks.skin)
        if looks.short_sleeves:
            canvas.limb((shoulder, elbow, wrist), 0.05 * scale, looks.skin)
            canvas.limb((shoulder, shoulder + 0.7 * (elbow - shoulder)), 1.1 * ARM_WIDTH * scale, shirt)
        else:
            canvas.limb((shoulder, elbow, wrist - 0.1 * (wrist - elbow)), ARM_WIDTH * scale, shirt)
    canvas.label = 4
    draw_head(head, keypoints, looks)


def draw_shoe(canvas: Canvas, knee: np.ndarray, ankle: np.ndarray, side: int, scale: float, colour: RGB) -> None:
    """From the heel outwards, flat on the ground if the shin is upright."""
    along = (ankle - knee) / np.linalg.norm(ankle - knee)
    out = side * np.array([along[1], -along[0]])
    heel = ankle + scale * (0.024 * along - 0.016 * out)
    canvas.limb((heel, heel + 0.062 * scale * out), 0.06 * scale, colour)


def draw_hand(canvas: Canvas, elbow: np.ndarray, wrist: np.ndarray, side: int, scale: float, colour: RGB) -> None:
    """A mitten, whose thumb points to the body when the arm hangs."""
    along = scale * (wrist - elbow) / np.linalg.norm(wrist - elbow)
    thumb = -side * np.array([along[1], -along[0]])
    canvas.limb((wrist, wrist + 0.036 * along), 0.06 * scale, colour)
    canvas.limb((wrist + 0.01 * along, wrist + 0.034 * along + 0.042 * thumb), 0.028 * scale, colour)


class Head:
    """Draws in units of the head's radius: the origin between the ears, x to the person's left, y up."""

    def __init__(self, canvas: Canvas, keypoints: np.ndarray):
        right, left = keypoints[16:18]
        self.canvas, self.middle = canvas, (right + left) / 2
        self.radius = float(np.linalg.norm(left - right)) / 2
        out = (left - right) / 2
        self.axes = np.stack([out, [out[1], -out[0]]])  # (2, 2): x and y in the image

    def at(self, points: Points) -> np.ndarray:
        return self.middle + np.asarray(points) @ self.axes

    def disc(self, x: float, y: float, radius: float, colour: RGB) -> None:
        self.canvas.disc(self.at((x, y)), radius * self.radius, colour)

    def line(self, points: Points, width: float, colour: RGB) -> None:
        self.canvas.limb(self.at(points), width * self.radius, colour)

    def polygon(self, points: Points, colour: RGB) -> None:
        self.canvas.polygon(self.at(points), colour)

    def blob(self, points: Points, colour: RGB) -> None:
        self.polygon(closed_curve(points), colour)


def draw_head(head: Head, keypoints: np.ndarray, looks: Looks) -> None:
    skin, hair = looks.skin, HAIR[looks.hair]
    if looks.style != "bald":
        head.disc(0, 0.18, 1.1, hair)
    for x in (-0.98, 0.98):
        head.disc(x, -0.05, 0.22, skin)
    head.blob(
        [(-0.97, 0.1), (-0.75, 0.75), (0, 1.0), (0.75, 0.75), (0.97, 0.1), (0.72, -0.68), (0, -1.0), (-0.72, -0.68)],
        skin,
    )
    draw_hair(head, looks.style, hair)
    for eye in keypoints[14:16]:
        head.canvas.disc(eye, 0.15 * head.radius, DARK)
    head.line([(-0.32, -0.42), (-0.16, -0.54), (0.16, -0.54), (0.32, -0.42)], 0.15, LIPS)
    if looks.hat:
        draw_hat(head, looks)


def draw_hair(head: Head, style: str, hair: RGB) -> None:
    if style == "bald":
        return
    if style == "bun":
        head.disc(0, 1.42, 0.48, hair)
    if style == "curly":
        for angle in np.linspace(-0.15 * np.pi, 1.15 * np.pi, 9):
            head.disc(1.0 * np.cos(angle), 0.3 + 0.95 * np.sin(angle), 0.36, hair)
    if style == "long":
        for side in (-1, 1):
            head.blob(
                [(side * 1.1, 0.5), (side * 0.72, 0.6), (side * 0.82, -0.4), (side * 0.98, -1.2), (side * 1.25, -1.2)],
                hair,
            )
    parting = {"short": 0.3, "long": 0.0, "curly": 0.1, "bun": 0.0}[style]
    head.blob([
        (-1.05, 0.25), (-0.95, 0.85), (0, 1.25), (0.95, 0.85), (1.05, 0.25), (0.75, 0.56), (parting, 0.72),
        (-0.75, 0.56),
    ], hair)  # fmt: skip


def draw_hat(head: Head, looks: Looks) -> None:
    if looks.hat == "cap":
        colour = COLOURS[looks.cap]
        head.blob([(-1.12, 0.5), (-0.85, 1.15), (0, 1.42), (0.85, 1.15), (1.12, 0.5), (0, 0.62)], colour)
        head.line([(-0.6, 0.55), (1.45, 0.5)], 0.26, colour)
    elif looks.hat == "top hat":
        head.polygon([(-0.85, 0.7), (-0.8, 2.0), (0.8, 2.0), (0.85, 0.7)], DARK)
        head.polygon([(-0.84, 0.8), (-0.83, 1.08), (0.83, 1.08), (0.84, 0.8)], (186, 48, 52))
        head.line([(-1.25, 0.68), (1.25, 0.68)], 0.24, DARK)
    else:
        head.blob([(-0.9, 0.6), (-0.75, 1.4), (0, 1.6), (0.75, 1.4), (0.9, 0.6)], STRAW)
        head.polygon([(-0.88, 0.66), (-0.86, 0.98), (0.86, 0.98), (0.88, 0.66)], (176, 96, 60))
        head.line([(-1.45, 0.56), (0, 0.66), (1.45, 0.56)], 0.26, STRAW)
