"""`people`: a cartoon person in a random pose; the hint is its skeleton as OpenPose draws it."""

import numpy as np

from controlnet.hints.pose import draw_pose

from .colours import COLOURS
from .world import Canvas, Sample, World, distance, distinct_colours


class People(World):
    """Captions: 'person in <colour> shirt and <colour> trousers with <colour> background'.

    The caption does not mention the skin, of one of a few tones, nor the dark hair and shoes.
    """

    name = "people"

    def __getitem__(self, index: int) -> Sample:
        rng = self.rng(index)
        ground, shirt, trousers = distinct_colours(rng, self.colours, 3)
        keypoints = random_pose(rng)
        skins = [skin for skin in SKINS if distance(skin, COLOURS[ground]) >= 60]  # so that hands and face are visible
        skin = skins[rng.integers(len(skins))]
        image, mask = draw_person(self.size, keypoints, skin, shirt, trousers, ground)
        caption = f"person in {shirt} shirt and {trousers} trousers with {ground} background"
        keypoints = keypoints * self.size
        return Sample(image, draw_pose(keypoints, (self.size, self.size)), caption, mask, keypoints)


SKINS = ((255, 219, 172), (224, 172, 105), (141, 85, 36))  # every background is 60 or more from one of them
DARK = (40, 32, 32)  # hair, eyes and shoes

# As fractions of the person's height. Each arm and leg is a chain of two bones.
HEAD_RADIUS, NECK, TORSO, SHOULDER, HIP = 0.085, 0.115, 0.29, 0.105, 0.065
UPPER_ARM, FOREARM, THIGH, SHIN = 0.16, 0.15, 0.22, 0.21
ARM_WIDTH, LEG_WIDTH = 0.062, 0.085


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
        bones[eye] = head + HEAD_RADIUS * (0.2 * up + 0.4 * side * out)
        bones[ear] = head + HEAD_RADIUS * (0.05 * up + side * out)

    height = rng.uniform(0.72, 0.98)
    low = np.minimum(bones.min(axis=0), head - 1.2 * HEAD_RADIUS) - LEG_WIDTH / 2
    high = bones.max(axis=0) + LEG_WIDTH / 2
    height = min(height, 0.98 / (high - low).max())
    corner = rng.uniform(0, 1 - height * (high - low))
    return corner + height * (bones - low)


def towards(side: int, angle: float) -> np.ndarray:
    """The unit vector at `angle` from straight down, outwards to the person's right (`side` 1) or left (-1)."""
    return np.array([-side * np.sin(angle), np.cos(angle)])


def draw_person(
    size: int, keypoints: np.ndarray, skin: tuple[int, int, int], shirt: str, trousers: str, ground: str
) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints (18, 2), as fractions of the side -> image, uint8 (H, W, 3), and mask, bool (H, W)."""
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
