"""The recipe's data: they depend on seed, epoch and step alone, and held-out data are never trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import needs
from PIL import Image
from recipe_runs import config_of, tool

pytestmark = needs("train.py")


def data_of(rank: int = 0, world: int = 1, **changes: Any) -> Any:
    return tool("recipe.datasets").load_data(config_of(**changes), tool("recipe.processes").Process(rank, world))


def equal(batches: list[Any], others: list[Any]) -> bool:
    """Return True if two lists of batches are equal."""
    return len(batches) == len(others) and all(
        torch.equal(a, b) for pair in zip(batches, others, strict=True) for a, b in zip(*pair, strict=True)
    )


def write_images(folder: Path) -> str:
    """Write a small data set in the format of ImageNet."""
    for part, count in (("train", 5), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                noise = torch.randint(256, (20, 24, 3), generator=torch.Generator().manual_seed(100 * label + index))
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
    root = {"data__root": write_images(tmp_path)} if request.param == "imagefolder" else {}
    return {**KINDS[request.param], **root}


def test_batches_depend_on_seed_epoch_and_step_alone(kind: dict[str, Any]) -> None:
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
    alone, parts = data_of(**plain), [data_of(rank, 2, **plain) for rank in (0, 1)]
    assert alone.steps == parts[0].steps
    if kind.get("data__name") != "text":
        for batch, *halves in zip(alone.batches(1), *(part.batches(1) for part in parts), strict=True):
            joined = tuple(torch.cat(tensors) for tensors in zip(*halves, strict=True))
            assert equal([batch], [joined])
    else:
        assert not equal(*(list(part.batches(1)) for part in parts))
    held_out = [torch.cat([x.flatten(1) for x, _ in data.held_out()]) for data in (alone, *parts)]
    assert {bytes(row.numpy().tobytes()) for row in held_out[0]} == {
        bytes(row.numpy().tobytes()) for rows in held_out[1:] for row in rows
    }
    assert abs(len(held_out[1]) - len(held_out[2])) <= 1


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(tool("recipe.errors").RecipeError, match=r"data.batch=300 is over all processes, and 7 of them"):
        data_of(0, 7)


def test_each_image_is_shifted_and_some_are_flipped() -> None:
    images = torch.arange(1.0, 4 * 3 * 6 * 6 + 1).view(4, 3, 6, 6)
    cropped = tool("recipe.datasets").crop_and_flip(images, torch.Generator().manual_seed(0), most=2)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    for image, wide in zip(cropped, padded, strict=True):
        windows = [wide[:, top : top + 6, left : left + 6] for top in range(5) for left in range(5)]
        assert any(torch.equal(image, window) for window in [*windows, *(window.flip(2) for window in windows)])
    assert not torch.equal(cropped, images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data__name": "imagefolder"}, "needs data.root, a folder that contains 'train' and 'val'"),
        ({"data__name": "imagefolder", "data__root": "/none"}, "data.root='/none' is not a folder of images"),
        (
            {"data__name": "cifar10", "data__root": "/none", "data__download": False},
            "CIFAR-10 is not in data.root='/none', and could not be downloaded: .*cifar-10-batches-py",
        ),
    ],
)
def test_data_that_are_not_there_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(tool("recipe.errors").RecipeError, match=message):
        data_of(**settings)


def test_both_parts_must_have_the_same_classes(tmp_path: Path) -> None:
    root = write_images(tmp_path)
    (tmp_path / "val" / "cat").rename(tmp_path / "val" / "cow")
    with pytest.raises(tool("recipe.errors").RecipeError, match="different classes: 'cat' is in one"):
        data_of(data__name="imagefolder", data__root=root)


# Glyphs.


def face(family: str, seed: int, style: str = "Regular", noise: float = 0.0) -> Any:
    glyphs = torch.rand(62, 32, 32, generator=torch.Generator().manual_seed(seed))
    noisy = glyphs + noise * torch.rand(62, 32, 32, generator=torch.Generator().manual_seed(1000 + seed))
    return tool("recipe.glyphs").Face(family, style, (100 * noisy).byte())


def families(*names: str) -> list[Any]:
    faces = [face(name, seed) for seed, name in enumerate(names)]
    # Random pixels are never negative, so that all faces would be similar: only their differences from the mean count.
    for random_face in faces:
        object.__setattr__(random_face, "glyphs", (random_face.glyphs > 50).to(torch.uint8) * 255)
    return faces


def test_held_out_families_and_their_copies_are_not_trained_on() -> None:
    glyphs = tool("recipe.glyphs")
    faces = families(*(f"Family{index} A" for index in range(9)))
    copies = [glyphs.Face(f"Copy{index}", "Regular", face.glyphs) for index, face in enumerate(faces)]
    widths = [glyphs.Face(f"Family{index} Wide", "Regular", face.glyphs.flip(2)) for index, face in enumerate(faces)]
    train, test = ({face.family for face in side} for side in glyphs.hold_out([*faces, *copies, *widths]))
    assert (len(train), len(test)) == (21, 6)
    for index in range(9):
        design = {f"Family{index} A", f"Family{index} Wide", f"Copy{index}"}
        assert design <= train or design <= test
    _, again = glyphs.hold_out([*widths, *copies, *faces])
    assert {face.family for face in again} == test
    # Families that neither look alike nor have related names are designs of their own.
    assert len(list(glyphs.designs(copies))) == 9


def test_too_few_fonts_are_refused_with_what_to_install(tmp_path: Path) -> None:
    glyphs, error = tool("recipe.glyphs"), tool("recipe.errors").RecipeError
    with pytest.raises(error, match=r"There are 0 families .* in .*\(none\).*apt-get install fonts-dejavu"):
        glyphs.glyph_images([str(tmp_path)], tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    with pytest.raises(
        error, match=r"There are 5 families of fonts .* among the fonts of this machine \(A, B, C, D, E\)"
    ):
        glyphs.hold_out(families(*"ABCDE"))
    with pytest.raises(error, match=r"There are 8 families .* of 1 designs"):
        glyphs.hold_out(families(*(f"One {name}" for name in "ABCDEFGH")))
    assert len(glyphs.hold_out(families(*"ABCDEF"))[1]) == 1


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
    trained = {bytes(image.flatten().tolist()) for image in train_x}
    # Glyphs of a single stroke, such as l, may be identical in any two fonts.
    shared = sum(bytes(image.flatten().tolist()) in trained for image in test_x)
    assert shared < 0.01 * len(test_x)
    (file,) = tmp_path.iterdir()
    changed = torch.load(file, weights_only=True)
    changed[0][1][0] = 61
    torch.save(changed, file)
    assert glyphs.glyph_images((), tmp_path)[0][1][0] == 61, "the cached images are not read"


def test_distortion_moves_pixels_and_keeps_ink() -> None:
    glyphs, data = tool("recipe.glyphs"), tool("recipe.data")
    images = torch.zeros(16, 1, 32, 32)
    images[:, :, 10:22, 12:20] = 1
    distorted = glyphs.distort(images, data.generator_of(3))
    assert torch.equal(distorted, glyphs.distort(images, data.generator_of(3)))
    assert len(distorted.unique(dim=0)) == 16
    ink = distorted.sum((1, 2, 3)) / images.sum((1, 2, 3))
    # Both sides may be scaled by up to 0.15, and bending changes the rest.
    assert 0.5 < float(ink.min()) < float(ink.max()) < 1.8
