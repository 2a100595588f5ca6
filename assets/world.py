"""The little world of the embedded base: captioned pictures of one coloured shape on a plain background.

Everything is drawn, nothing is downloaded. `draw` renders a `Scene` in the *plain* look that the base learns; `draw_neon`
renders the same scene in the look that only the demo dataset shows. All randomness comes from the `numpy` generator that
the caller passes.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 64  # pixels, both sides
_SUPERSAMPLE = 4  # shapes are drawn this many times larger and averaged down: smooth edges without a vector library

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS = {
    "red": (222, 28, 36),
    "orange": (250, 140, 10),
    "yellow": (250, 228, 40),
    "green": (30, 160, 60),
    "blue": (40, 84, 230),
    "purple": (150, 50, 190),
}
BACKGROUNDS = {
    "white": (246, 246, 246),
    "black": (14, 14, 14),
    "gray": (128, 128, 128),
    "pink": (255, 182, 204),
    "brown": (104, 68, 36),
    "teal": (0, 132, 132),
}
SIZES = {"small": 11.0, "medium": 15.0, "large": 20.0}  # radius in pixels
POSITIONS = {
    "in the middle": (32, 32),
    "on the left": (22, 32),
    "on the right": (42, 32),
    "at the top": (32, 22),
    "at the bottom": (32, 42),
}


@dataclass(frozen=True)
class Scene:
    """What a picture shows, in the words of the grammar."""

    shape: str
    colour: str
    background: str
    size: str = "medium"
    position: str = "in the middle"

    def caption(self) -> str:
        """The full caption: every attribute is named."""
        return f"a {self.size} {self.colour} {self.shape} {self.position} on a {self.background} background"


def is_held_out(scene: Scene) -> bool:
    """Whether the base never saw this (shape, colour, background): about one combination in eight."""
    return zlib.crc32(f"{scene.shape}/{scene.colour}/{scene.background}".encode()) % 8 == 0


def random_scene(rng: np.random.Generator) -> Scene:
    """Any scene of the world, uniformly."""
    return Scene(
        shape=str(rng.choice(SHAPES)),
        colour=str(rng.choice(list(COLOURS))),
        background=str(rng.choice(list(BACKGROUNDS))),
        size=str(rng.choice(list(SIZES))),
        position=str(rng.choice(list(POSITIONS))),
    )


def random_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption from the grammar: size and position are left unsaid in a third of the cases each, wording varies."""
    size = f"{scene.size} " if rng.random() > 1 / 3 else ""
    position = f" {scene.position}" if rng.random() > 1 / 3 else ""
    background = f"a {scene.background} background" if rng.random() > 0.25 else scene.background
    return f"a {size}{scene.colour} {scene.shape}{position} on {background}"


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The plain look: a flat shape on a flat background. RGB, `SIZE`×`SIZE`."""
    mask = _shape_mask(scene, rng)
    background, colour = _jitter(BACKGROUNDS[scene.background], rng), _jitter(COLOURS[scene.colour], rng)
    return Image.composite(Image.new("RGB", mask.size, colour), Image.new("RGB", mask.size, background), mask)


def draw_neon(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The look of the demo dataset: a glowing hollow tube on a darkened background. RGB, `SIZE`×`SIZE`."""
    mask = np.asarray(_shape_mask(scene, rng), np.float32) / 255
    inner = _shape_mask_array_eroded(mask, pixels=4)
    tube = np.clip(mask - inner, 0, 1)
    glow = _blur(tube, 3.0)
    colour = np.asarray(COLOURS[scene.colour], np.float32) / 255
    night = np.asarray(BACKGROUNDS[scene.background], np.float32) / 255 * 0.25
    bright = 0.85 * colour + 0.15
    picture = night + glow[..., None] * colour * 0.55
    picture = picture * (1 - tube[..., None]) + bright * tube[..., None]
    return Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))


def draw_anything(rng: np.random.Generator) -> Image.Image:
    """An uncaptioned scribble (random strokes, fills, outlines, blurs, shading): only the VAE sees these, so that it can
    code looks which the rest of the base never learns."""
    n = SIZE * 2
    top, bottom = rng.integers(0, 256, 3), rng.integers(0, 256, 3)
    if rng.random() < 0.5:
        bottom = top
    ramp = np.linspace(0, 1, n)[:, None, None]
    picture = Image.fromarray(np.broadcast_to(top * (1 - ramp) + bottom * ramp, (n, n, 3)).astype(np.uint8).copy())
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.integers(1, 7)):
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        points = [(int(x), int(y)) for x, y in rng.integers(-8, n + 8, (int(rng.integers(2, 6)), 2))]
        width = int(rng.integers(3, 14))
        kind = rng.integers(4)
        if kind == 0:
            pen.line(points, fill=colour, width=width, joint="curve")
        elif kind == 1:
            pen.polygon(points if len(points) > 2 else [*points, (n // 2, n // 2)], fill=colour)
        else:
            (x0, y0), (x1, y1) = points[0], points[1]
            box = (min(x0, x1), min(y0, y1), max(x0, x1) + 8, max(y0, y1) + 8)
            fill = colour if kind == 2 else None
            pen.ellipse(box, fill=fill, outline=colour, width=width)
        if rng.random() < 0.15:
            picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(1, 6))))
            pen = ImageDraw.Draw(picture)
    return picture.resize((SIZE, SIZE), Image.Resampling.BOX)


def _jitter(colour: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(np.clip(c + rng.integers(-6, 7), 0, 255)) for c in colour)
    return red, green, blue


def _blur(picture: np.ndarray, sigma: float) -> np.ndarray:
    image = Image.fromarray((picture * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(sigma))
    return np.asarray(image, np.float32) / 255


def _shape_mask_array_eroded(mask: np.ndarray, pixels: int) -> np.ndarray:
    image = Image.fromarray((mask * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.MinFilter(2 * pixels - 1)), np.float32) / 255


def _shape_mask(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Greyscale coverage of the shape, `SIZE`×`SIZE`, with a little jitter in place, size and angle."""
    k = _SUPERSAMPLE
    radius = SIZES[scene.size] * rng.uniform(0.94, 1.06) * k
    cx, cy = ((c + rng.uniform(-1.5, 1.5)) * k for c in POSITIONS[scene.position])
    turn = rng.uniform(-6, 6) * pi / 180
    image = Image.new("L", (SIZE * k, SIZE * k))
    pen = ImageDraw.Draw(image)
    points = [
        (cx + radius * (x * cos(turn) - y * sin(turn)), cy + radius * (x * sin(turn) + y * cos(turn)))
        for x, y in _outline(scene.shape)
    ]
    pen.polygon(points, fill=255)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def _outline(shape: str) -> list[tuple[float, float]]:
    """The shape's outline in a unit circle; y points down."""
    if shape == "circle":
        return [(cos(a) * 0.95, sin(a) * 0.95) for a in np.linspace(0, 2 * pi, 64, endpoint=False)]
    if shape == "square":
        return [(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)]
    if shape == "triangle":
        return [(0.0, -1.0), (0.98, 0.8), (-0.98, 0.8)]
    if shape == "star":
        radii = [1.08 if i % 2 == 0 else 0.45 for i in range(10)]
        return [(r * sin(i * pi / 5), -r * cos(i * pi / 5)) for i, r in enumerate(radii)]
    if shape == "cross":
        a, b = 0.34, 0.98
        return [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
    if shape == "heart":
        angles = np.linspace(0, 2 * pi, 72, endpoint=False)
        return [(sin(t) ** 3, -(13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)) / 16 - 0.08) for t in angles]
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
