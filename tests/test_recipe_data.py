"""The recipe's data: fixed by seed, epoch and step alone; nothing that is held out is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import needs
from PIL import Image
from recipe_runs import config_of, tool
from torch import Tensor

pytestmark = needs("train.py")


def data_of(rank: int = 0, world: int = 1, **changes: Any) -> Any:
    data = tool("recipe.data")
    return data.load_data(config_of(**changes), data.Place(rank, world))


def equal(one: list[Any], other: list[Any]) -> bool:
    """Return True if two lists of batches hold the same."""
    return len(one) == len(other) and all(
        torch.equal(a, b) for pair in zip(one, other, strict=True) for a, b in zip(*pair, strict=True)
    )


def pictures(folder: Path) -> str:
    for part, count in (("train", 5), ("val", 2)):
        for place, name in enumerate(("cat", "dog")):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                noise = torch.randint(256, (20, 24, 3), generator=torch.Generator().manual_seed(100 * place + index))
                Image.frombytes("RGB", (24, 20), bytes(noise.flatten().tolist())).save(
                    folder / part / name / f"{index}.png"
                )
    return str(folder)


KINDS: dict[str, dict[str, Any]] = {
    "digits": {},
    "text": {"data__name": "text", "data__batch": 4, "data__steps": 3, "data__length": 16},
    "imagefolder": {"data__name": "imagefolder", "data__batch": 2, "data__side": 8},
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    root = {"data__root": pictures(tmp_path)} if request.param == "imagefolder" else {}
    return {**KINDS[request.param], **root}


def test_batches_are_fixed_by_seed_epoch_and_step(kind: dict[str, Any]) -> None:
    data = data_of(**kind)
    first = list(data.batches(0))
    assert len(first) == data.steps
    torch.rand(1)
    assert equal(list(data_of(**kind).batches(0)), first)
    assert equal(list(data.batches(0, 2)), first[2:])
    for other in (data.batches(1), data_of(seed=1, **kind).batches(0)):
        assert not equal(list(other), first)


def test_processes_share_the_samples_of_a_step(kind: dict[str, Any]) -> None:
    plain = {**kind, "data__augment": False}
    whole, parts = data_of(**plain), [data_of(rank, 2, **plain) for rank in (0, 1)]
    assert whole.steps == parts[0].steps
    if kind.get("data__name") != "text":
        for batch, *halves in zip(whole.batches(1), *(one.batches(1) for one in parts), strict=True):
            joined = tuple(torch.cat(one) for one in zip(*halves, strict=True))
            assert equal([batch], [joined])
    else:
        assert not equal(*(list(one.batches(1)) for one in parts))
    held = [torch.cat([x.flatten(1) for x, _ in one.held_out()]) for one in (whole, *parts)]
    assert {bytes(row.numpy().tobytes()) for row in held[0]} == {
        bytes(row.numpy().tobytes()) for one in held[1:] for row in one
    }
    assert abs(len(held[1]) - len(held[2])) <= 1


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(tool("recipe.errors").RecipeError, match=r"data.batch=300 is over all processes, and 7 of them"):
        data_of(0, 7)


def test_cropping_moves_and_turns_round_each_image() -> None:
    images = torch.arange(1.0, 4 * 3 * 6 * 6 + 1).view(4, 3, 6, 6)
    found = tool("recipe.images").cropped(images, torch.Generator().manual_seed(0), most=2)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    for image, wide in zip(found, padded, strict=True):
        windows = [wide[:, top : top + 6, left : left + 6] for top in range(5) for left in range(5)]
        wanted = [*windows, *(one.flip(2) for one in windows), *(one.flip(2) for one in map(_turned(wide), range(25)))]
        assert any(torch.equal(image, one) for one in wanted)
    assert not torch.equal(found, images)


def _turned(wide: Tensor) -> Any:
    return lambda place: wide[:, place // 5 : place // 5 + 6, place % 5 : place % 5 + 6]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data__name": "imagefolder"}, "needs data.root, a folder that holds 'train' and 'val'"),
        ({"data__name": "imagefolder", "data__root": "/none"}, "data.root='/none' is no folder of pictures"),
        (
            {"data__name": "cifar10", "data__root": "/none", "data__download": False},
            "CIFAR-10 is not in data.root='/none', and could not be fetched: .*cifar-10-batches-py",
        ),
    ],
)
def test_data_that_cannot_be_had_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(tool("recipe.errors").RecipeError, match=message):
        data_of(**settings)


def test_classes_must_be_those_of_training(tmp_path: Path) -> None:
    root = pictures(tmp_path)
    (tmp_path / "val" / "cat").rename(tmp_path / "val" / "cow")
    with pytest.raises(tool("recipe.errors").RecipeError, match="different classes: 'cat' is in one only"):
        data_of(data__name="imagefolder", data__root=root)


# Glyphs.


def face(family: str, seed: int, style: str = "Regular", noise: float = 0.0) -> Any:
    glyphs = torch.rand(62, 32, 32, generator=torch.Generator().manual_seed(seed))
    moved = glyphs + noise * torch.rand(62, 32, 32, generator=torch.Generator().manual_seed(1000 + seed))
    return tool("recipe.glyphs").Face(family, style, (100 * moved).byte())


def families(*names: str) -> list[Any]:
    faces = [face(name, seed) for seed, name in enumerate(names)]
    # Noise is never negative, so all of it is alike: what counts is what differs from its mean.
    for one in faces:
        object.__setattr__(one, "glyphs", (one.glyphs > 50).to(torch.uint8) * 255)
    return faces


def test_held_out_families_and_their_copies_are_not_trained_on() -> None:
    glyphs = tool("recipe.glyphs")
    faces = families(*(f"Family{index} A" for index in range(9)))
    copies = [glyphs.Face(f"Copy{index}", "Regular", one.glyphs) for index, one in enumerate(faces)]
    widths = [glyphs.Face(f"Family{index} Wide", "Regular", one.glyphs.flip(2)) for index, one in enumerate(faces)]
    train, test = glyphs.held_apart([*faces, *copies, *widths])
    kept, out = ({one.family for one in side} for side in (train, test))
    assert (len(kept), len(out)) == (21, 6)
    for index in range(9):
        own = {f"Family{index} A", f"Family{index} Wide", f"Copy{index}"}
        assert own <= kept or own <= out
    again = glyphs.held_apart([*widths, *copies, *faces])
    assert {one.family for one in again[1]} == out
    # Without the copies, families that look alike would be told apart by name alone.
    assert len(list(glyphs.designs(copies))) == 9


def test_too_few_fonts_are_refused_with_what_to_install(tmp_path: Path) -> None:
    glyphs, error = tool("recipe.glyphs"), tool("recipe.errors").RecipeError
    with pytest.raises(error, match=r"There are 0 families .* in .*\(none\).*apt-get install fonts-dejavu"):
        glyphs.glyph_images([str(tmp_path)], tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    with pytest.raises(
        error, match=r"There are 5 families of fonts .* among the fonts of this machine \(A, B, C, D, E\)"
    ):
        glyphs.held_apart(families(*"ABCDE"))
    with pytest.raises(error, match=r"There are 8 families .* of 1 designs"):
        glyphs.held_apart(families(*(f"One {name}" for name in "ABCDEFGH")))
    assert len(glyphs.held_apart(families(*"ABCDEF"))[1]) == 1


def test_glyphs_of_real_fonts(tmp_path: Path) -> None:
    glyphs = tool("recipe.glyphs")
    try:
        (train_x, train_y), (test_x, test_y) = glyphs.glyph_images((), tmp_path)
    except tool("recipe.errors").RecipeError as error:
        pytest.skip(str(error))
    for images, labels in ((train_x, train_y), (test_x, test_y)):
        assert images.shape[1:] == (1, 32, 32)
        assert len(images) == len(labels) > 0
        assert torch.equal(labels.bincount(), torch.full((62,), len(images) // 62))
        assert all(len(images[labels == index].unique(dim=0)) > len(images) // 124 for index in (0, 26, 52))
    trained = {bytes(one.flatten().tolist()) for one in train_x}
    # Single strokes, as of l, may come out alike in any two fonts.
    seen = sum(bytes(one.flatten().tolist()) in trained for one in test_x)
    assert seen < 0.01 * len(test_x)
    (file,) = tmp_path.iterdir()
    changed = torch.load(file, weights_only=True)
    changed[0][1][0] = 61
    torch.save(changed, file)
    assert glyphs.glyph_images((), tmp_path)[0][1][0] == 61, "what was drawn is not read again"


def test_bending_moves_pixels_and_keeps_ink() -> None:
    glyphs, data = tool("recipe.glyphs"), tool("recipe.data")
    images = torch.zeros(16, 1, 32, 32)
    images[:, :, 10:22, 12:20] = 1
    found = glyphs.distorted(images, data.generator_of(3))
    assert torch.equal(found, glyphs.distorted(images, data.generator_of(3)))
    assert len(found.unique(dim=0)) == 16
    ink = found.sum((1, 2, 3)) / images.sum((1, 2, 3))
    # Both sides may be scaled by up to 0.15, and bending moves what is left.
    assert 0.5 < float(ink.min()) < float(ink.max()) < 1.8
