"""Write small files of every kind that users save, for ``tests/test_samples.py``.

The files beside this script are from version 0.1.0 as it was before its folders were laid out anew. They stay as they are:
later versions must go on reading them. For samples of another version, check it out and name a new folder::

    PYTHONPATH=/path/to/that/checkout python tests/samples/write.py tests/samples/another
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import tdfx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sample_models import ConvNet, FunctionalNet, batch, train

RATIO = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, round_to=1)

POLICIES = {
    "rules.toml": """\
rank = "vbmf,at_least=8 | ratio:0.5"
scheme = "tucker2:refine=2"
include = ["conv*", "fc"]
exclude = ["conv9"]
min_gain = 1.2
round_to = "auto"

[cost]
use = "measured"
budget = 30
autocast = "bfloat16"

[overrides]
"conv1" = {rank = {"*" = [4, 6]}, scheme = "spatial"}
fc = "keep"
""",
    "ranks.json": {
        "rank": {"conv*": [3, 5], "*": 2},
        "min_gain": 0,
        "cost": "modelled",
        "overrides": {"conv2": {"rank": "ratio:0.5"}},
    },
    "speedup.toml": """\
speedup = 1.5

[cost]
use = "modelled"
flops_per_second = 1e11

[overrides]
conv2 = {round_to = 4}
""",
    "outputs.json": {"parameters": 0.5, "error": "outputs", "min_gain": 0, "cost": "modelled"},
    "params.toml": 'rank = "params:0.5"\nmin_gain = 0\nround_to = 1\n',
    "flops.toml": 'rank = "flops:0.5"\nmin_gain = 0\nround_to = 1\n',
    "energy.json": {"rank": "energy:0.9,at_least=2", "min_gain": 0, "round_to": 1},
}


class Reasons(nn.Module):
    """A network whose layers are kept for many reasons."""

    def __init__(self) -> None:
        super().__init__()
        self.excluded = nn.Linear(128, 128)
        self.frozen = nn.Linear(128, 128)
        self.frozen.weight.requires_grad_(False)
        self.tied1 = nn.Linear(128, 128)
        self.tied2 = nn.Linear(128, 128)
        self.tied2.weight = self.tied1.weight
        self.read = nn.Linear(128, 128)
        self.parametrized = torch.nn.utils.parametrizations.weight_norm(nn.Linear(128, 128))
        self.unused = nn.Linear(128, 128)
        self.custom = Doubled(128, 128)
        self.plain = nn.Linear(128, 128)
        self.noise = nn.Linear(128, 128)
        self.large = nn.Linear(128, 128)
        self.tiny = nn.Linear(128, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.excluded, self.frozen, self.tied1, self.tied2, self.parametrized, self.custom, self.plain):
            x = layer(x)
        out: Tensor = self.tiny(self.large(self.noise(self.read(x) + self.read.weight.sum())))
        return out


class Doubled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        """Double the output."""
        return torch.nn.functional.linear(input, 2 * self.weight, self.bias)


def main(folder: Path) -> None:
    """Write all samples into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    expected: dict[str, Any] = {}
    _write_checkpoints(folder, expected)
    _write_plans(folder)
    _write_policies(folder)
    _write_switches(folder)
    _write_onnx(folder, expected)
    _write_pickles(folder, expected)
    (folder / "expected.json").write_text(json.dumps(expected, indent=1))


def _outputs(model: nn.Module) -> Any:
    with torch.no_grad():
        return model.eval()(batch()).tolist()


def _write_checkpoints(folder: Path, expected: dict[str, Any]) -> None:
    """Write checkpoints, with their outputs now and after one more training step."""
    cases: list[tuple[str, Callable[[], nn.Module], Callable[..., torch.optim.Optimizer], tdfx.Emit]] = [
        ("dense", ConvNet, SGD, "graph"),
        ("factorized_sgd", ConvNet, SGD, "graph"),
        ("factorized_adamw", ConvNet, AdamW, "modules"),
        ("merged", ConvNet, SGD, "graph"),
        ("functional", FunctionalNet, SGD, "graph"),
    ]
    for name, build, kind, emit in cases:
        torch.manual_seed(0)
        model = build()
        settings = {"momentum": 0.9} if kind is SGD else {}
        optimizer = kind(model.parameters(), lr=0.01, **settings)
        train(model, optimizer, 2)
        if name != "dense":
            model = tdfx.rewrite(model, RATIO, optimizer=optimizer, emit=emit)
            train(model, optimizer)
        if name == "merged":
            model = tdfx.merge(model, optimizer=optimizer)
        tdfx.save(model, folder / f"{name}.tdfx", optimizer=optimizer, extra={"step": 3, "name": name})
        outputs = _outputs(model)
        train(model.train(), optimizer)
        expected[name] = {"outputs": outputs, "outputs_after_a_step": _outputs(model)}


def _write_plans(folder: Path) -> None:
    torch.manual_seed(0)
    net, reasons = ConvNet(), Reasons()
    plans = {
        "plan_ratio": tdfx.plan(net, RATIO),
        "plan_energy": tdfx.plan(
            net,
            tdfx.Policy(rank=tdfx.Energy(share=0.5).at_least(2) | tdfx.Ratio(of=0.5), min_gain=0, round_to=1),
            example_inputs=(batch(),),
        ),
        "plan_budget": tdfx.plan(net, tdfx.Policy(parameters=0.5, min_gain=0), example_inputs=(batch(),)),
        "plan_measured": tdfx.plan(
            net, tdfx.Policy(cost=tdfx.Measured(rounds=1, cache=False)), example_inputs=(batch(),)
        ),
        "plan_functional": tdfx.plan(FunctionalNet(), RATIO, example_inputs=(batch(),), emit="modules"),
        "plan_reasons": tdfx.plan(
            reasons,
            tdfx.Policy(
                rank=tdfx.VBMF(),
                exclude=("excluded",),
                overrides={"plain": tdfx.Policy(scheme="spatial"), "large": tdfx.Policy(rank=tdfx.Ratio(of=1.0))},
                cost=tdfx.Modelled(seconds_per_call=0),
            ),
            example_inputs=(torch.randn(4, 128),),
        ),
        "plan_factorized": tdfx.plan(tdfx.rewrite(net, RATIO), tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0)),
    }
    for name, plan in plans.items():
        (folder / f"{name}.json").write_text(plan.to_json())


def _write_policies(folder: Path) -> None:
    for name, content in POLICIES.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        (folder / f"policy_{name}").write_text(text)


def _write_switches(folder: Path) -> None:
    """Write the state of a ``Switch`` before and after it switched, beside the model and its optimizer."""
    budget = tdfx.Policy(parameters=0.5, min_gain=0, cost=tdfx.Modelled())
    settled = tdfx.Settled(every=1, window=1, tolerance=0.5, moved=0.0, timeout=50)
    for name, policy, when, steps in (
        ("at_step", budget, tdfx.AtStep(3), (2, 4)),
        ("settled", RATIO, settled, (1, 6)),
    ):
        torch.manual_seed(0)
        model: nn.Module = ConvNet()
        optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
        switch = tdfx.Switch(policy, when=when)
        for step in range(1, steps[-1] + 1):
            train(model, optimizer)
            # With inputs, Settled would look at the weights of so small a network only once in a hundred steps.
            inputs = None if name == "settled" else (batch(),)
            model = switch.step(model, optimizer=optimizer, example_inputs=inputs)
            if step in steps:
                saved = {
                    "switch": switch.state_dict(),
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }
                torch.save(saved, folder / f"switch_{name}_{'before' if step == steps[0] else 'after'}.pt")


def _write_onnx(folder: Path, expected: dict[str, Any]) -> None:
    """Export a factorized model; its checkpoint is beside it."""
    torch.manual_seed(0)
    model = tdfx.rewrite(ConvNet(), RATIO)
    tdfx.export(model, folder / "factorized.onnx", example_inputs=(batch(),), output_names=["y"])
    _remove_stack_traces(folder / "factorized.onnx")
    tdfx.save(model, folder / "exported.tdfx")
    expected["exported"] = {"outputs": _outputs(model)}


def _remove_stack_traces(path: Path) -> None:
    """Remove the traces that torch notes at each node, because they name the folders of this machine."""
    proto = onnx.load(path)
    for node in proto.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key != "pkg.torch.onnx.stack_trace"]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    onnx.save(proto, path)


def _write_pickles(folder: Path, expected: dict[str, Any]) -> None:
    """Pickle whole models: in both forms, and with a factorized parameter."""
    cases: list[tuple[str, Callable[[], nn.Module], tdfx.Emit]] = [
        ("graph", ConvNet, "graph"),
        ("modules", ConvNet, "modules"),
        ("functional", FunctionalNet, "graph"),
    ]
    for name, build, emit in cases:
        torch.manual_seed(0)
        model = tdfx.rewrite(build(), RATIO, emit=emit)
        torch.save(model, folder / f"model_{name}.pt")
        expected[f"model_{name}"] = {"outputs": _outputs(model)}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Usage: PYTHONPATH=/path/to/a/checkout python tests/samples/write.py FOLDER")
    with tempfile.TemporaryDirectory() as aside:
        main(Path(aside))  # first elsewhere, so that a failure leaves no half of the samples
        target = Path(sys.argv[1])
        target.mkdir(parents=True, exist_ok=True)
        for file in Path(aside).iterdir():
            (target / file.name).write_bytes(file.read_bytes())
