"""The proof on six architectures: it accepts equal models, and reports each planted change for what it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
from onnx import ModelProto
from onnx_models import disguise
from planted import ARCHITECTURES, INTERFACIAL, STRUCTURAL, Plant, inputs_of, perturb_weight, reverse_initializers
from torch import Tensor

import tdfx
from tdfx.onnx_proof.report import VerifyReport
from tdfx.onnx_proof.torch_to_onnx import export_module


@dataclass(frozen=True)
class Case:
    """One architecture after a rewrite, some training and a merge, each state as an ONNX file."""

    x: Tensor
    factorized: Path
    """After training."""
    merged: Path
    reference: Path
    """A new instance of the class with the merged weights."""
    proto: ModelProto
    """The content of ``merged``."""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.manual_seed(0)
    x, model = inputs_of(request.param), build(request.param).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        _step(model, optimizer, x)
    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, cost=tdfx.Modelled())
    factorized = tdfx.rewrite(model, policy, optimizer=optimizer)
    for _ in range(2):
        _step(factorized, optimizer, x)
    merged = tdfx.merge(factorized)
    reference = build(request.param)
    reference.load_state_dict(merged.state_dict(), strict=True)
    folder = tmp_path_factory.mktemp(request.param)
    states = {"factorized": factorized, "merged": merged, "reference": reference}
    paths = {name: folder / f"{name}.onnx" for name in states}
    for name, state in states.items():
        export_module(state, (x,), paths[name])
    return Case(x, **paths, proto=onnx.load(paths["merged"]))


def build(name: str) -> torch.nn.Module:
    model = ARCHITECTURES[name]()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # Running statistics must follow within a few steps; else outputs vanish in eval mode, and any weights match.
            module.momentum = 0.9
    return model


def _step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    loss = torch.nn.functional.cross_entropy(model(x), torch.tensor([1, 2]))
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def test_the_merged_model_is_the_original_architecture(case: Case) -> None:
    report = tdfx.verify(case.merged, case.reference, case.x)
    assert report.ok, report
    assert report.structure_matches
    assert report.interface_matches
    assert report.numbers_match
    assert (report.place, report.contracted, report.weight) == (None, (), None)


def test_the_factorized_model_is_the_merged_one_after_contraction(case: Case) -> None:
    report = tdfx.verify(case.factorized, case.merged, case.x)
    assert report.structure_matches, report
    assert report.interface_matches
    assert report.numbers_match, report
    assert len(report.contracted) >= report.approximate > 2


@pytest.mark.parametrize("plant", STRUCTURAL, ids=lambda plant: str(plant.__name__))
def test_a_planted_change_of_the_structure_is_named(case: Case, plant: Plant, tmp_path: Path) -> None:
    report, name = _planted(case, plant, tmp_path)
    assert not report.ok
    assert not report.structure_matches
    assert report.structure is not None
    assert name in f"{report.structure}\n{report.place}"
    assert report.place is not None or "opset" in name


@pytest.mark.parametrize("plant", INTERFACIAL, ids=lambda plant: str(plant.__name__))
def test_a_planted_change_of_the_interface_is_named(case: Case, plant: Plant, tmp_path: Path) -> None:
    report, name = _planted(case, plant, tmp_path)
    assert not report.ok
    assert report.structure_matches
    assert not report.interface_matches
    assert name in str(report.interface)
    assert report.place is not None


def test_a_perturbed_weight_changes_only_the_numbers(case: Case, tmp_path: Path) -> None:
    report, name = _planted(case, perturb_weight, tmp_path)
    assert not report.ok
    assert report.graphs_match
    assert not report.numbers_match
    assert f"the first stored tensor that differs is {name!r}: 1 of its " in str(report)


def test_order_and_inner_names_make_no_difference(case: Case, tmp_path: Path) -> None:
    other = disguise(case.proto, seed=1)
    reverse_initializers(other)
    onnx.save(other, tmp_path / "other.onnx")
    assert tdfx.verify(tmp_path / "other.onnx", case.reference, case.x).ok


def _planted(case: Case, plant: Plant, folder: Path) -> tuple[VerifyReport, str]:
    model = ModelProto.FromString(case.proto.SerializeToString())
    name = plant(model)
    if name is None:
        pytest.skip("this architecture has no such node")
    onnx.save(model, folder / "planted.onnx")
    return tdfx.verify(folder / "planted.onnx", case.reference, case.x), name
