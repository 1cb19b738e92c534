"""A data set of glyphs from the fonts that a machine has: 62 classes, and held-out fonts that are never trained on."""

from __future__ import annotations

import hashlib
import os
import string
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from recipe.errors import RecipeError

CLASSES = string.ascii_uppercase + string.ascii_lowercase + string.digits
SIDE = 32
"""Side of an image in pixels."""
LEAST_FAMILIES, LEAST_DESIGNS = 6, 4
_PACKAGES = "fonts-dejavu fonts-liberation fonts-freefont-ttf fonts-lato fonts-roboto-unhinted fonts-inconsolata"
SAME_DESIGN = 0.93
"""Families with two faces of a higher cosine similarity of their pixels count as one design."""
TURN, ZOOM, SHIFT, BEND = 0.2, 0.15, 0.12, 0.09
"""Largest rotation (radians), scaling, translation and bending of a glyph (in halves of the side)."""
_VERSION = 1
_NO_TEXT = ("symbol", "dingbat", "keyboard")
"""Parts of the names of families whose letters are pictures."""

Images = tuple[Tensor, Tensor]
"""Images (n, 1, SIDE, SIDE) of bytes, and labels (n,)."""


@dataclass(frozen=True, slots=True)
class Face:
    """The glyphs of one font file."""

    family: str
    style: str
    glyphs: Tensor
    """Bytes (62, SIDE, SIDE), white on black."""


def font_folders() -> list[Path]:
    """Return the folders in which this system keeps its fonts."""
    home = Path.home()
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    if os.name == "nt":
        return [Path(os.environ.get("WINDIR", "C:/Windows"), "Fonts")]
    return [Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), home / ".fonts", home / ".local/share/fonts"]


def glyph_images(folders: Sequence[str], cache: Path) -> tuple[Images, Images]:
    """Return images to train on and held-out images; they are drawn once and then read from a cache folder.

    ``folders`` are searched for fonts, without any the system's own; RecipeError if there are too few families.
    """
    searched = [Path(folder).expanduser() for folder in folders] or font_folders()
    paths = (path for folder in searched for path in folder.rglob("*"))
    files = sorted(path for path in paths if path.suffix.lower() in {".ttf", ".otf"})
    listing = "\n".join(f"{file.name} {file.stat().st_size}" for file in files)
    cached = cache / f"glyphs-{_VERSION}-{hashlib.sha256(listing.encode()).hexdigest()[:16]}.pt"
    if cached.is_file():
        train, test = torch.load(cached, weights_only=True)
        return tuple(train), tuple(test)
    train_faces, test_faces = hold_out(draw_faces(files), folders)
    parts = _labelled(train_faces), _labelled(test_faces)
    cache.mkdir(parents=True, exist_ok=True)
    partial = cached.with_name(f"{cached.name}.{os.getpid()}")
    torch.save([list(part) for part in parts], partial)
    partial.replace(cached)
    return parts


def draw_faces(files: Sequence[Path]) -> list[Face]:
    """Return the faces that have all letters and digits; a font that is installed several times counts once."""
    faces: dict[tuple[str, str], Face] = {}
    for face in filter(None, map(draw_face, files)):
        faces.setdefault((face.family, face.style), face)
    return [faces[key] for key in sorted(faces)]


def draw_face(file: Path) -> Face | None:
    """Draw a font's letters and digits; return None if some are missing, if it has symbols, or if it cannot be read."""
    try:
        font = ImageFont.truetype(str(file), round(SIDE * 0.72), layout_engine=ImageFont.Layout.BASIC)
        family, style = font.getname()
        glyphs = torch.stack([_draw_glyph(font, letter) for letter in CLASSES])
        placeholder = _draw_glyph(font, "\U0010fffd")
    except (OSError, ValueError):
        return None
    # Capital I and small l look the same in some fonts; missing letters all look like the placeholder.
    distinct = len({bytes(glyph.flatten().tolist()) for glyph in glyphs})
    incomplete = any(torch.equal(glyph, placeholder) for glyph in glyphs)
    if incomplete or distinct < len(CLASSES) - 4 or any(word in (family or "").lower() for word in _NO_TEXT):
        return None
    return Face(family or file.stem, style or "", glyphs)


def _draw_glyph(font: ImageFont.FreeTypeFont, letter: str) -> Tensor:
    """Draw a glyph, centered horizontally and on a common base line, so that o and O differ."""
    image = Image.new("L", (SIDE, SIDE))
    position = ((SIDE - font.getlength(letter)) / 2, 0.72 * SIDE)
    ImageDraw.Draw(image).text(position, letter, fill=255, font=font, anchor="ls")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(SIDE, SIDE)


def hold_out(faces: Sequence[Face], folders: Sequence[str] = ()) -> tuple[list[Face], list[Face]]:
    """Split faces into those to train on and a fourth of the designs, held out; RecipeError if there are too few."""
    families = sorted({face.family for face in faces})
    groups = list(designs(faces))
    if len(families) < LEAST_FAMILIES or len(groups) < LEAST_DESIGNS:
        where = f"in {', '.join(folders)}" if folders else "among the fonts of this machine"
        names = ", ".join(families[:5]) or "none"
        raise RecipeError(
            f"There are {len(families)} families of fonts with all letters and digits {where} ({names}), of {len(groups)} "
            f"designs. {LEAST_FAMILIES} families of {LEAST_DESIGNS} designs are needed, so that some can be held out. "
            f"Install more, on Debian: apt-get install {_PACKAGES}"
        )
    # The largest group is always trained on, because most free fonts are related to it.
    groups.sort(key=lambda group: (-sum(face.family in group for face in faces), min(group)))
    order = torch.randperm(len(groups) - 1, generator=torch.Generator().manual_seed(0)) + 1
    held_out = {family for index in order[: len(groups) // 4].tolist() for family in groups[index]}
    train, test = ([face for face in faces if (face.family in held_out) == side] for side in (False, True))
    return train, test


def designs(faces: Sequence[Face]) -> Iterator[set[str]]:
    """Yield families that share a design: related names, as the widths of a font have, or similar pixels, as copies have."""
    by_family: dict[str, list[Face]] = {family: [] for family in sorted({face.family for face in faces})}
    for face in faces:
        by_family[face.family].append(face)
    while by_family:
        waiting = {next(iter(by_family)): None}
        group = dict[str, list[Face]]()
        while waiting:
            family, _ = waiting.popitem()
            faces = group[family] = by_family.pop(family)
            related = (other for other in by_family if _are_related(family, faces, other, by_family[other]))
            waiting |= dict.fromkeys(related)
        yield set(group)


def _are_related(name: str, faces: Sequence[Face], other_name: str, other_faces: Sequence[Face]) -> bool:
    stacked = (torch.stack([face.glyphs for face in side]).flatten(1).float() for side in (faces, other_faces))
    pixels, other_pixels = map(F.normalize, stacked)
    return name.split()[0] == other_name.split()[0] or bool((pixels @ other_pixels.T).max() > SAME_DESIGN)


def _labelled(faces: Sequence[Face]) -> Images:
    images = torch.cat([face.glyphs for face in faces]).unsqueeze(1)
    return images, torch.arange(len(CLASSES)).repeat(len(faces))


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, scale, translate and bend each image (n, 1, h, w) by its own random amounts (Simard et al. 2003)."""
    count = len(images)

    def uniform(most: float) -> Tensor:
        return (2 * torch.rand(count, generator=generator) - 1) * most

    angle, wide, high = uniform(TURN), 1 + uniform(ZOOM), 1 + uniform(ZOOM)
    first = wide * angle.cos(), -high * angle.sin(), uniform(SHIFT)
    second = wide * angle.sin(), high * angle.cos(), uniform(SHIFT)
    affine = torch.stack([torch.stack(first, 1), torch.stack(second, 1)], 1)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    # A coarse field of random displacements, made smooth by interpolation.
    displacements = (2 * torch.rand(count, 2, 5, 5, generator=generator) - 1) * BEND
    bend = F.interpolate(displacements, size=images.shape[-2:], mode="bicubic", align_corners=True)
    return F.grid_sample(images, grid + bend.permute(0, 2, 3, 1), align_corners=False)
