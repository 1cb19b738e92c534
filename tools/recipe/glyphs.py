"""A set of real glyphs, made of the fonts that a machine has: 62 classes, and fonts held out that are never trained on."""

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
"""Pixels of a side."""
LEAST_FAMILIES, LEAST_DESIGNS = 6, 4
_PACKAGES = "fonts-dejavu fonts-liberation fonts-freefont-ttf fonts-lato fonts-roboto-unhinted fonts-inconsolata"
ALIKE = 0.93
"""Families of which two faces are more alike than this, by the cosine of their pixels, count as one design."""
TURN, ZOOM, SHIFT, BEND = 0.2, 0.15, 0.12, 0.09
"""Most that a glyph is turned (radians), scaled, moved and bent (parts of half its side)."""
_VERSION = 1
_NO_TEXT = ("symbol", "dingbat", "keyboard")
"""What names of families hold whose letters are pictures."""


@dataclass(frozen=True, slots=True)
class Face:
    """One font file, drawn."""

    family: str
    style: str
    glyphs: Tensor
    """Bytes (62, SIDE, SIDE), white on black."""


def font_folders() -> list[Path]:
    """Return where this system keeps its fonts."""
    home = Path.home()
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    if os.name == "nt":
        return [Path(os.environ.get("WINDIR", "C:/Windows"), "Fonts")]
    return [Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), home / ".fonts", home / ".local/share/fonts"]


def glyph_images(folders: Sequence[str], cache: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return images (n, 1, SIDE, SIDE) of bytes and labels (n,), to train on and held out; drawn once, then read.

    Args:
        folders: Where to look for fonts; none for the system's own.
        cache: Folder in which what was drawn is kept.

    Raises:
        RecipeError: There are too few families of fonts.
    """
    files = sorted(
        path
        for folder in ([Path(one).expanduser() for one in folders] or font_folders())
        for path in folder.rglob("*")
        if path.suffix.lower() in {".ttf", ".otf"}
    )
    known = "\n".join(f"{one.name} {one.stat().st_size}" for one in files)
    kept = cache / f"glyphs-{_VERSION}-{hashlib.sha256(known.encode()).hexdigest()[:16]}.pt"
    if kept.is_file():
        train, test = torch.load(kept, weights_only=True)
        return tuple(train), tuple(test)
    sides = _stacked(*held_apart(drawn(files), [str(one) for one in folders]))
    cache.mkdir(parents=True, exist_ok=True)
    partial = kept.with_name(f"{kept.name}.{os.getpid()}")
    torch.save([list(one) for one in sides], partial)
    partial.replace(kept)
    return sides


def drawn(files: Sequence[Path]) -> list[Face]:
    """Return the faces that have all letters and digits, each font once however often it is installed."""
    faces: dict[tuple[str, str], Face] = {}
    for file in files:
        face = draw(file)
        if face is not None:
            faces.setdefault((face.family, face.style), face)
    return [faces[key] for key in sorted(faces)]


def draw(file: Path) -> Face | None:
    """Draw a font's letters and digits; None for one of symbols, or that lacks some or cannot be read."""
    try:
        font = ImageFont.truetype(str(file), round(SIDE * 0.72), layout_engine=ImageFont.Layout.BASIC)
        family, style = font.getname()
        glyphs = torch.stack([_glyph(font, one) for one in CLASSES])
        missing = _glyph(font, "\U0010fffd")
    except (OSError, ValueError):
        return None
    # Capital I and small l look the same in some fonts; what a font lacks looks the same for all.
    distinct = len({bytes(one.flatten().tolist()) for one in glyphs})
    lacks = any(torch.equal(one, missing) for one in glyphs)
    if lacks or distinct < len(CLASSES) - 4 or any(word in (family or "").lower() for word in _NO_TEXT):
        return None
    return Face(family or file.stem, style or "", glyphs)


def _glyph(font: ImageFont.FreeTypeFont, letter: str) -> Tensor:
    """Return one glyph, its advance in the middle and its base line where all have it, so that o and O differ."""
    picture = Image.new("L", (SIDE, SIDE))
    at = ((SIDE - font.getlength(letter)) / 2, 0.72 * SIDE)
    ImageDraw.Draw(picture).text(at, letter, fill=255, font=font, anchor="ls")
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(SIDE, SIDE)


def held_apart(faces: Sequence[Face], folders: Sequence[str] = ()) -> tuple[list[Face], list[Face]]:
    """Return faces to train on and faces held out: a fourth of the designs, so that no family or copy of one is in both.

    Raises:
        RecipeError: There are too few families.
    """
    families = sorted({one.family for one in faces})
    groups = list(designs(faces))
    if len(families) < LEAST_FAMILIES or len(groups) < LEAST_DESIGNS:
        where = f"in {', '.join(folders)}" if folders else "among the fonts of this machine"
        named = ", ".join(families[:5]) or "none"
        raise RecipeError(
            f"There are {len(families)} families of fonts with all letters and digits {where} ({named}), of {len(groups)} "
            f"designs. {LEAST_FAMILIES} families of {LEAST_DESIGNS} designs are needed, so that some can be held out. "
            f"Install more, on Debian: apt-get install {_PACKAGES}"
        )
    # The largest is always trained on: most free fonts are related to it, one way or another.
    groups.sort(key=lambda group: (-sum(one.family in group for one in faces), min(group)))
    order = torch.randperm(len(groups) - 1, generator=torch.Generator().manual_seed(0)) + 1
    out = {family for place in order[: len(groups) // 4].tolist() for family in groups[place]}
    return [one for one in faces if one.family not in out], [one for one in faces if one.family in out]


def designs(faces: Sequence[Face]) -> Iterator[set[str]]:
    """Yield families that belong together: by name, as the widths of one are, or by looks, as free copies of one are."""
    left = {family: [one for one in faces if one.family == family] for family in sorted({one.family for one in faces})}
    while left:
        group, waiting = set[str](), [next(iter(left))]
        while waiting:
            mine = waiting.pop()
            group.add(mine)
            own = left.pop(mine)
            waiting += [other for other in left if other not in waiting and _related(mine, own, other, left[other])]
        yield group


def _related(name: str, own: Sequence[Face], other_name: str, other: Sequence[Face]) -> bool:
    if name.split()[0] == other_name.split()[0]:
        return True
    mine, theirs = (F.normalize(torch.stack([one.glyphs.float().flatten() for one in side])) for side in (own, other))
    return bool((mine @ theirs.T).max() > ALIKE)


def _stacked(train: Sequence[Face], test: Sequence[Face]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def side(faces: Sequence[Face]) -> tuple[Tensor, Tensor]:
        images = torch.cat([one.glyphs for one in faces]).unsqueeze(1)
        return images, torch.arange(len(CLASSES)).repeat(len(faces))

    return side(train), side(test)


def distorted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale, move and bend each image (n, 1, h, w), each by its own random amounts (Simard et al. 2003)."""
    count = len(images)

    def uniform(most: float) -> Tensor:
        return (2 * torch.rand(count, generator=generator) - 1) * most

    angle = uniform(TURN)
    wide, high = 1 + uniform(ZOOM), 1 + uniform(ZOOM)
    rows = (
        (wide * angle.cos(), -high * angle.sin(), uniform(SHIFT)),
        (wide * angle.sin(), high * angle.cos(), uniform(SHIFT)),
    )
    grid = F.affine_grid(torch.stack([torch.stack(one, 1) for one in rows], 1), list(images.shape), align_corners=False)
    # A coarse field of random arrows, made smooth by interpolation.
    arrows = (2 * torch.rand(count, 2, 5, 5, generator=generator) - 1) * BEND
    bend = F.interpolate(arrows, size=images.shape[-2:], mode="bicubic", align_corners=True)
    return F.grid_sample(images, grid + bend.permute(0, 2, 3, 1), align_corners=False)
