"""Saving and loading: the same bits are restored, damage is noticed, and a failure changes nothing."""

from __future__ import annotations

import io
import os
import random
import zipfile
from collections.abc import Callable
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import tdfx
from tdfx.checkpoint import atomic, sealed_file

HALF = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0)
QUARTER = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0)


class Slotted(nn.Module):
    """A parameter that is a function's weight, a grouped and a transposed convolution, and a difference between modes."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(16, 8))
        self.grouped = nn.Conv2d(8, 16, 3, groups=2, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.scale: Tensor
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.up(F.relu(self.grouped(x)))))
        y = F.linear(y.mean((2, 3)), self.kernel)
        return y * self.scale if self.training else y


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x.flatten(1)[:, :8]))  # type: ignore[no-any-return]


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 8),
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(model(x).square().mean())
    optimizer.step()


def batch() -> Tensor:
    return torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(5))


def same(model: nn.Module, other: nn.Module) -> bool:
    tensors, others = model.state_dict(), other.state_dict()
    return list(tensors) == list(others) and all(
        torch.equal(tensor, others[name])
        and tensor.stride() == others[name].stride()
        and tensor.dtype == others[name].dtype
        for name, tensor in tensors.items()
    )


def values_of(model: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in [*model.parameters(), *model.buffers()]]


@pytest.mark.parametrize("emit", ["graph", "modules"])
@pytest.mark.parametrize("when", ["before", "switched", "lowered", "merged", "partly"])
@pytest.mark.parametrize("build", [convolutions, Slotted, Tied])
@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_a_restored_run_continues_with_the_same_numbers(
    tmp_path: Path, build: Callable[[], nn.Module], when: str, emit: tdfx.Emit, kind: type[torch.optim.Optimizer]
) -> None:
    model, x = build(), batch()
    settings: dict[str, Any] = {"momentum": 0.9} if kind is SGD else {}
    optimizer = kind(model.parameters(), lr=0.01, **settings)  # type: ignore[call-arg]
    step(model, optimizer, x)
    if when == "partly":
        if not isinstance(model, nn.Sequential):
            pytest.skip("this model has no part to rewrite alone")
        model[2] = tdfx.rewrite(model[2], HALF, optimizer=optimizer, emit=emit)
    elif when != "before":
        model = tdfx.rewrite(model, HALF, optimizer=optimizer, emit=emit)
        step(model, optimizer, x)
    if when == "lowered":
        model = tdfx.rewrite(model, QUARTER, optimizer=optimizer, emit=emit)
    if when == "merged":
        model = tdfx.merge(model, optimizer=optimizer)
    tdfx.save(model, tmp_path / "run.tdfx", optimizer=optimizer)
    dense = build()
    before = values_of(dense)
    other = kind(dense.parameters(), lr=1.0)  # type: ignore[call-arg]
    again = tdfx.load(tmp_path / "run.tdfx", dense, optimizer=other)
    assert all(torch.equal(*pair) for pair in zip(before, values_of(dense), strict=True))
    assert same(model, again)
    assert [type(module).__name__ for module in model.modules()] == [
        type(module).__name__ for module in again.modules()
    ]
    for _ in range(2):
        step(model, optimizer, x)
        step(again, other, x)
    assert same(model, again)
    assert not torch.equal(values_of(again)[0], before[0])
    if when not in {"before", "merged"}:
        assert list(tdfx.merge(again).state_dict()) == list(build().state_dict())


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    for name in ("eigh", "svd", "qr"):
        original = getattr(torch.linalg, name)

        def call(*args: Any, original: Any = original, **named: Any) -> Any:
            calls.append(1)
            return original(*args, **named)

        monkeypatch.setattr(torch.linalg, name, call)
    return calls


def test_loading_decomposes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    model = tdfx.rewrite(convolutions(), HALF)
    assert len(calls) >= 3
    calls.clear()
    with torch.device("meta"):
        dense = convolutions()
    again = tdfx.load(tdfx.state(model), dense)
    assert calls == []
    assert same(model, again)
    assert all(parameter.is_meta for parameter in dense.parameters())


def test_a_rewrite_without_values_takes_a_state_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    model = convolutions()
    plan = tdfx.plan(model, HALF)
    small = tdfx.rewrite(model, plan)
    calls = counted(monkeypatch)
    with torch.device("meta"):
        dense = convolutions()
    by_assignment = tdfx.rewrite(dense, plan, init="empty")
    assert all(parameter.is_meta for parameter in by_assignment.parameters())
    by_assignment.load_state_dict(small.state_dict(), assign=True)
    by_copy = tdfx.rewrite(convolutions(), plan, init="empty")
    by_copy.load_state_dict(small.state_dict())
    emptied = tdfx.rewrite(dense, plan, init="empty").to_empty(device="cpu")
    emptied.load_state_dict(small.state_dict())
    assert calls == []
    assert same(small, by_assignment)
    assert same(small, by_copy)
    assert same(small, emptied)


def test_a_rewrite_without_values_needs_a_plan_and_an_optimizer_without_state() -> None:
    model = convolutions()
    with pytest.raises(tdfx.PolicyError, match="Pass the plan in place of the policy"):
        tdfx.rewrite(model, HALF, init="empty")
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer, batch())
    with pytest.raises(tdfx.OptimizerError, match="has taken no step"):
        tdfx.rewrite(model, tdfx.plan(model, HALF), init="empty", optimizer=optimizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_layouts_flags_and_extra_are_restored(tmp_path: Path, dtype: torch.dtype) -> None:
    model: nn.Module = convolutions().to(dtype).to(memory_format=torch.channels_last)
    model = tdfx.rewrite(model, HALF)
    next(model.parameters()).requires_grad_(False)
    extra = {"rng": torch.get_rng_state(), "python": random.getstate(), "nested": [(1, None, 2j), {"a": {1, 2}}]}
    tdfx.save(model, tmp_path / "run.tdfx", extra=extra)
    saved = tdfx.read(tmp_path / "run.tdfx")
    again = tdfx.load(saved, convolutions)
    assert same(model, again)
    assert [parameter.requires_grad for parameter in again.parameters()] == [
        parameter.requires_grad for parameter in model.parameters()
    ]
    assert any(parameter.dim() == 4 and not parameter.is_contiguous() for parameter in again.parameters())
    assert torch.equal(saved["extra"].pop("rng"), extra.pop("rng"))  # type: ignore[arg-type]
    assert saved["extra"] == extra


def saved_run(tmp_path: Path) -> tuple[Path, nn.Module]:
    model: nn.Module = convolutions()
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    model = tdfx.rewrite(model, HALF, optimizer=optimizer)
    step(model, optimizer, batch())
    tdfx.save(model, tmp_path / "run.tdfx", optimizer=optimizer)
    return tmp_path / "run.tdfx", model


def test_every_damage_is_noticed(tmp_path: Path) -> None:
    path, _ = saved_run(tmp_path)
    whole = path.read_bytes()
    draw = random.Random(0)
    broken = tmp_path / "broken.tdfx"
    for size in [0, 1, 7, 20, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(60))]:
        broken.write_bytes(whole[:size])
        with pytest.raises(tdfx.CheckpointError, match=r"cut off|damaged"):
            tdfx.read(broken)
    for place in [0, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(200))]:
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        broken.write_bytes(changed)
        with pytest.raises(tdfx.CheckpointError, match=r"cut off|damaged"):
            tdfx.read(broken)
    broken.write_bytes(whole)
    assert tdfx.read(broken)["model"] == tdfx.read(path)["model"]


def test_torch_can_read_the_file_too(tmp_path: Path) -> None:
    path, model = saved_run(tmp_path)
    assert list(torch.load(path, weights_only=True)["tensors"]) == list(model.state_dict())


def test_foreign_and_newer_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save({"a": 1}, path)
    with pytest.raises(tdfx.CheckpointError, match=r"tdfx\.save did not write it"):
        tdfx.load(path, convolutions)
    with pytest.raises(tdfx.CheckpointError, match="could not be read"):
        tdfx.load(tmp_path / "missing", convolutions)
    with pytest.raises(tdfx.CheckpointError, match=r"with model\.load_state_dict"):
        tdfx.load(dict(convolutions().state_dict()), convolutions)
    with pytest.raises(tdfx.CheckpointError, match="has format 2, and this tdfx"):
        tdfx.load({**tdfx.state(convolutions()), "format": 2}, convolutions)
    with pytest.raises(tdfx.CheckpointError, match="'tensors' is a list, not a dict"):
        tdfx.load({**tdfx.state(convolutions()), "tensors": []}, convolutions)


def narrow() -> nn.Module:
    model = convolutions()
    model[0] = nn.Conv2d(8, 12, 3, padding=1)
    return model


def untied() -> nn.Module:
    model = Tied()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return model


@pytest.mark.parametrize(
    ("model", "build", "message"),
    [
        (lambda: tdfx.rewrite(convolutions(), HALF), Slotted, "whose rewrite does not fit this Slotted"),
        (lambda: tdfx.rewrite(convolutions(), HALF), narrow, "of shape"),
        (convolutions, Slotted, "it lacks"),
        (convolutions, lambda: convolutions()[:5], "that this Sequential lacks"),
        (convolutions, narrow, r"has shape \(16, 8, 3, 3\), and the model's has \(12, 8, 3, 3\)"),
        (Tied, untied, "shares the parameters"),
    ],
)
def test_another_model_is_refused(model: Callable[[], nn.Module], build: Callable[[], nn.Module], message: str) -> None:
    dense = build()
    optimizer = SGD(dense.parameters(), lr=0.1, momentum=0.9)
    before, held = values_of(dense), list(optimizer.param_groups[0]["params"])
    trained = model()
    record = tdfx.state(trained, optimizer=SGD(trained.parameters(), lr=0.1, momentum=0.9))
    with pytest.raises(tdfx.CheckpointError, match=message):
        tdfx.load(record, dense, optimizer=optimizer)
    assert all(torch.equal(*pair) for pair in zip(before, values_of(dense), strict=True))
    assert all(parameter is other for parameter, other in zip(held, optimizer.param_groups[0]["params"], strict=True))


def test_another_optimizer_is_refused_and_unchanged(tmp_path: Path) -> None:
    path, _ = saved_run(tmp_path)
    dense = convolutions()
    first, *others = dense.parameters()
    cases: list[tuple[Any, str]] = [
        (AdamW(dense.parameters(), lr=0.1), "holds the state of SGD, and optimizer 0 is AdamW"),
        (SGD([{"params": [first]}, {"params": others}], lr=0.1), "has 1 parameter groups"),
        (SGD(others, lr=0.1), "1 differ, '0.weight' first"),
        (SGD([*dense.parameters(), nn.Parameter(torch.zeros(1))], lr=0.1), "parameters that are not the model's"),
        ([SGD([first], lr=0.1), SGD(others, lr=0.1)], "the state of 1 optimizers, and 2 were passed"),
    ]
    for optimizer, message in cases:
        both = optimizer if isinstance(optimizer, list) else [optimizer]
        held = [list(group["params"]) for each in both for group in each.param_groups]
        with pytest.raises(tdfx.CheckpointError, match=message):
            tdfx.load(path, dense, optimizer=optimizer)
        now = [list(group["params"]) for each in both for group in each.param_groups]
        assert [[id(parameter) for parameter in group] for group in held] == [
            [id(parameter) for parameter in group] for group in now
        ]
        assert all(group["lr"] == 0.1 and not each.state for each in both for group in each.param_groups)
    with pytest.raises(tdfx.CheckpointError, match="Build the model first"):
        tdfx.load(path, convolutions, optimizer=cases[0][0])


def test_arrays_of_numpy_come_back_as_tensors_and_others_are_refused(tmp_path: Path) -> None:
    path, model = saved_run(tmp_path)
    array, state = np.arange(6.0).reshape(2, 3)[:, ::-1], np.random.default_rng(0).bit_generator.state
    tdfx.save(model, path, extra={"array": array, "best": np.float32(0.5), "at": np.int64(3), "rng": state})
    extra = tdfx.read(path)["extra"]
    assert extra.pop("array").tolist() == array.tolist()
    assert extra == {"best": 0.5, "at": 3, "rng": state}
    assert [type(extra[key]) for key in ("best", "at")] == [float, int]
    before = path.read_bytes()
    with pytest.raises(tdfx.CheckpointError, match=r"extra\['a'\] is a NumPy array of <U1, and .* by \.tolist\(\), or"):
        tdfx.save(model, path, extra={"a": np.array(["x"])})
    assert path.read_bytes() == before


def test_a_value_that_needs_code_is_refused_and_located(tmp_path: Path) -> None:
    path, model = saved_run(tmp_path)
    before = path.read_bytes()
    with pytest.raises(tdfx.CheckpointError, match=r"extra\['a'\]\[1\] is a builtins.function"):
        tdfx.save(model, path, extra={"a": [1, batch]})
    with pytest.raises(tdfx.CheckpointError, match="holds no parameter of this"):
        tdfx.save(model, path, optimizer=SGD(convolutions().parameters(), lr=0.1))
    assert path.read_bytes() == before


def test_a_failed_write_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = saved_run(tmp_path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(atomic.os, "fsync", full)  # type: ignore[attr-defined]
    with pytest.raises(tdfx.CheckpointError, match=r"could not be written: no space left"):
        tdfx.save(model, path)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["run.tdfx"]
    with pytest.raises(tdfx.CheckpointError, match="could not be written"):
        tdfx.save(model, tmp_path / "nowhere" / "run.tdfx")


def leftover(target: Path) -> Path:
    """Leave a temporary file as a process does that is killed while it writes."""
    with atomic.open_temporary(target) as file:
        file.write(b"half of it")
    return Path(file.name)


@pytest.mark.skipif(os.name == "nt", reason="this system has no such locks")
def test_a_save_removes_the_leftovers_of_dead_processes_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = saved_run(tmp_path)
    dead, other_target = leftover(path), leftover(tmp_path / "run.tdfx.2")
    unrelated = tmp_path / ".run.tdfx.notes.tmp"
    unrelated.touch()
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_machine", lambda: "0123abcd")
        recent, old = leftover(path), leftover(path)
    os.utime(old, (0, 0))
    with atomic.open_temporary(path) as alive:
        tdfx.save(model, path)
        assert not dead.exists()
        assert not old.exists()
        assert {entry.name for entry in tmp_path.iterdir()} == {
            path.name, other_target.name, unrelated.name, recent.name, Path(alive.name).name
        }  # fmt: skip
        os.replace(alive.name, tmp_path / "other")  # noqa: PTH105
    assert tdfx.read(path)["model"] == "Sequential"


@pytest.mark.skipif(os.name == "nt", reason="this system has no such locks")
def test_a_file_that_is_removed_before_it_is_locked_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, removals = atomic._lock, iter([True, False])

    def lock_late(file: BufferedWriter) -> None:
        if next(removals):
            atomic.remove_leftovers(tmp_path / "run.tdfx")
        lock(file)

    monkeypatch.setattr(atomic, "_lock", lock_late)
    with atomic.open_temporary(tmp_path / "run.tdfx") as file:
        assert [path.name for path in tmp_path.iterdir()] == [Path(file.name).name]
    assert list(removals) == []


def test_torchs_checksum_is_off_and_its_setting_unchanged(tmp_path: Path) -> None:
    path, _ = saved_run(tmp_path)
    with zipfile.ZipFile(io.BytesIO(path.read_bytes()[: -sealed_file._SEAL.size])) as inside:
        assert {entry.CRC for entry in inside.infolist()} == {0}
    assert torch.serialization.get_crc32_options()


def test_a_file_has_ordinary_permissions_and_keeps_those_that_it_had(tmp_path: Path) -> None:
    path, model = saved_run(tmp_path)
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    path.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(path)
    tdfx.save(model, link)
    assert os.readlink(link) == str(path)  # noqa: PTH115
    assert path.stat().st_mode & 0o777 == 0o640
