"""What may be seen at a pixel of a scene, and as which class of ADE20K a segmentation map shows it."""

# Name -> number of the class in hints/ade20k.py. Where ADE20K has no such class, a comment names the one that stands in
# for it, which nothing else here has; what is in the sky counts as sky.
ADE20K_CLASSES = {
    "sky": 2,
    "sun": 2,
    "moon": 2,
    "cloud": 2,
    "mountain": 16,
    "hill": 68,
    "grass": 9,
    "sand": 46,
    "snow": 13,  # earth
    "sea": 26,
    "water": 21,
    "house": 25,
    "castle": 1,  # building
    "windmill": 84,  # tower
    "lighthouse": 82,  # light
    "tent": 114,
    "umbrella": 149,  # flag
    "tree": 4,
    "pine": 4,
    "flower": 66,
    "mushroom": 133,  # hood
    "car": 20,
    "boat": 76,
    "rocket": 90,  # airplane
    "balloon": 115,  # bag
    "bird": 126,
    "fish": 126,
    "cat": 126,
    "dog": 126,
    "snowman": 132,  # sculpture
    "person": 12,
}
CLASSES = tuple(ADE20K_CLASSES)
