"""Every kind of checkpoint becomes dense: the weights are those of ``tdfx.merge``, bit by bit, and no model is built."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn import functional as F

import tdfx
from tdfx.checkpoint.sealed_file import write_sealed
from tdfx.cli import main

QUARTER = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, round_to=1, cost=tdfx.Modelled())
State = dict[str, Any]


class Net(nn.Module):
    """One layer of every shape, a parameter that functions use, and a layer that is held twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2, bias=False)
        self.up = nn.ConvTranspose2d(16, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.table = nn.Parameter(torch.randn(16, 8))
        self.head = nn.Linear(16, 16)
        self.again = self.head

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.up(self.grouped(self.stem(x)))).mean((2, 3))
        y: Tensor = self.again(self.head(F.linear(x, self.table)))
        return y


X = torch.ones(2, 8, 8, 8)


def rewritten(emit: Any = "modules") -> tuple[nn.Module, tdfx.Plan, State]:
    """Return a factorized model, its plan, and the state_dict that it has when it is merged."""
    torch.manual_seed(0)
    dense = Net()
    plan = tdfx.plan(dense, QUARTER, example_inputs=(X,), emit=emit)
    assert len(plan.factorized) == 5
    model = tdfx.rewrite(dense, plan)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model, plan, tdfx.merge(model).state_dict()


def same(found: State, expected: State) -> bool:
    """Return True if two state_dicts have the same names, dtypes and bits."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]) for name in expected
    )


def command(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["merge", *arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("emit", ["graph", "modules"])
def test_a_file_of_tdfx(emit: str) -> None:
    model, _, expected = rewritten(emit)
    tdfx.save(model, "run.tdfx", optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    for output in ("dense.safetensors", "dense.pt"):
        assert "run.tdfx: 6 layers merged" in command("run.tdfx", "-o", output)
        assert same(tdfx.merge_checkpoint(output, plan=tdfx.plan(nn.Linear(2, 2))), expected)
    Net().load_state_dict(torch.load("dense.pt", weights_only=True))
    torch.save({"run": tdfx.state(model), "epoch": 3}, "own.pt")
    assert same(tdfx.merge_checkpoint("own.pt"), expected)


def test_masters_are_what_is_joined() -> None:
    model, _, _ = rewritten()
    half = tdfx.rewrite(tdfx.merge(model).to(torch.bfloat16), QUARTER, example_inputs=(X.to(torch.bfloat16),))
    masters = {parameter: nn.Parameter(parameter.detach().float() * 1.001) for parameter in half.parameters()}
    record = tdfx.state(half, masters=masters)
    wide = {name: masters[parameter] for name, parameter in half.named_parameters()}
    factors = [wide[f"head.factors.{index}.weight"] for index in (0, 1)]
    expected = (factors[1].double() @ factors[0].double()).bfloat16()
    assert torch.equal(tdfx.merge_checkpoint(record)["head.weight"], expected)


def with_plan_file(state: State, plan: tdfx.Plan) -> dict[str, Any]:
    torch.save(state, "w.pt")
    return {"plan": plan}


def beside_a_switch(state: State, plan: tdfx.Plan) -> dict[str, Any]:
    torch.save({"model": state, "switch": {"format": 1, "plan": plan.to_json(), "step": 3}}, "w.pt")
    return {}


def in_ddp_compiled(state: State, plan: tdfx.Plan) -> dict[str, Any]:
    torch.save({f"module._orig_mod.{name}": value for name, value in state.items()}, "w.pt")
    return {"plan": plan}


def of_lightning(state: State, plan: tdfx.Plan) -> dict[str, Any]:
    callbacks = {
        "SwitchCallback{'attribute': None}": {"switch": {"plan": plan.to_json()}, "merged": False, "names": []}
    }
    parts = {f"net.{name}": value for name, value in state.items()} | {"loss.weight": torch.ones(3)}
    torch.save({"state_dict": parts, "callbacks": callbacks, "pytorch-lightning_version": "2.6.0"}, "w.pt")
    return {}


@pytest.mark.parametrize("way", [with_plan_file, beside_a_switch, in_ddp_compiled, of_lightning])
def test_a_state_dict_with_a_plan(way: Callable[[State, tdfx.Plan], dict[str, Any]]) -> None:
    model, plan, expected = rewritten()
    settings = way(model.state_dict(), plan)
    found = tdfx.merge_checkpoint("w.pt", **settings)
    prefix = next(name for name in found if name.endswith("table")).removesuffix("table")
    assert same({name.removeprefix(prefix): found[name] for name in found if name.startswith(prefix)}, expected)
    assert len(found) == len(expected) + (way is of_lightning)


def test_a_checkpoint_of_lightning_stays_one() -> None:
    model, plan, expected = rewritten()
    of_lightning(model.state_dict(), plan)
    command("w.pt", "-o", "dense.ckpt")
    content = torch.load("dense.ckpt", weights_only=True)
    assert content.keys() == {"state_dict", "pytorch-lightning_version"}
    assert torch.equal(content["state_dict"]["net.head.weight"], expected["head.weight"])
    torch.save(model.state_dict(), "plain.pt")
    Path("plan.json").write_text(plan.to_json())
    assert "would be a checkpoint of Lightning" in command("plain.pt", "--plan", "plan.json", "-o", "x.ckpt", code=2)
    assert not Path("x.ckpt").exists()


@pytest.mark.parametrize("files", [1, 2])
def test_a_folder_of_hugging_face(files: int) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    model, plan, expected = rewritten()
    # It leaves out names that share memory.
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("again")}
    expected = {name: value for name, value in expected.items() if not name.startswith("again")}
    folder = Path("checkpoint-4")
    folder.mkdir()
    names = list(state)
    shards = {f"model-0000{part + 1}-of-00002.safetensors": names[part::2] for part in range(2)}
    for shard, held in (shards if files > 1 else {"model.safetensors": names}).items():
        save_file({name: state[name] for name in held}, folder / shard, metadata={"format": "pt"})
    if files > 1:
        index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("config.json", "tokenizer.json", "optimizer.pt", "rng_state_0.pth"):
        (folder / name).write_text("{}")
    write_sealed({"switch": {"plan": plan.to_json()}, "merged": False, "names": []}, folder / "tdfx.pt")
    assert same(tdfx.merge_checkpoint(folder), expected)
    command("checkpoint-4", "-o", "dense")
    kept = {"config.json", "tokenizer.json", "model.safetensors"}
    kept = kept if files == 1 else {*kept, *shards, "model.safetensors.index.json"} - {"model.safetensors"}
    assert {path.name for path in Path("dense").iterdir()} == kept
    again = tdfx.merge_checkpoint("dense", plan=plan)
    assert {name: torch.equal(again[name], expected[name]) for name in expected} == dict.fromkeys(expected, True)


def test_a_distributed_checkpoint() -> None:
    import torch.distributed.checkpoint as dcp

    model, plan, expected = rewritten()
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("again")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that there is one process
        save: Any = vars(dcp)["save"]
        save({"model": state}, checkpoint_id="dcp", no_dist=True)
    with pytest.raises(tdfx.CheckpointError, match=r"whose \.metadata is code that runs when it is read.*--trusted"):
        tdfx.merge_checkpoint("dcp", plan=plan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = tdfx.merge_checkpoint("dcp", plan=plan, trusted=True)
    assert {name: torch.equal(found[name], expected[name]) for name in found} == dict.fromkeys(found, True)
    assert len(found) == len(expected) - 2


def test_a_kind_that_stores_its_weight_otherwise() -> None:
    transformers = pytest.importorskip("transformers.pytorch_utils")
    model = tdfx.rewrite(nn.Sequential(transformers.Conv1D(16, 32)), QUARTER, emit="modules")
    assert same(tdfx.merge_checkpoint(tdfx.state(model)), tdfx.merge(model).state_dict())


@pytest.mark.parametrize("scheme", ["svd", "tucker2", "tucker1_in", "tucker1_out", "spatial", "cp"])
def test_every_scheme(scheme: str) -> None:
    model = tdfx.rewrite(nn.Sequential(nn.Conv2d(8, 8, 3)), tdfx.Policy(**vars_of(QUARTER), scheme=scheme))
    assert same(tdfx.merge_checkpoint(tdfx.state(model)), tdfx.merge(model).state_dict())


def vars_of(policy: tdfx.Policy) -> dict[str, Any]:
    return {"rank": policy.rank, "min_gain": 0, "cost": policy.cost}


def test_a_dense_checkpoint_comes_back_as_it_is() -> None:
    state = Net().state_dict()
    torch.save(state, "w.pt")
    with pytest.warns(tdfx.TdfxWarning, match="holds no factors and no plan"):
        assert same(tdfx.merge_checkpoint("w.pt", "dense.pt"), state)
    assert "no factors in it, so nothing to merge; dense.safetensors: 15 tensors" in command(
        "w.pt", "-o", "dense.safetensors"
    )


def other_plan() -> tdfx.Plan:
    return tdfx.plan(Net(), tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, cost=tdfx.Modelled()), example_inputs=(X,))


def damaged() -> State:
    model, plan, _ = rewritten()
    state = {name: value for name, value in model.state_dict().items() if name != "head.factors.1.weight"}
    return {"model": state, "plan": plan.to_json()}


MISUSES: dict[str, tuple[Callable[[], Any], str]] = {
    "no plan": (
        lambda: tdfx.merge_checkpoint(rewritten()[0].state_dict()),
        r"factors of 6 layers, 'again' first, and no plan that says how .* could only be guessed\. .*tdfx merge --plan",
    ),
    "another plan": (
        lambda: tdfx.merge_checkpoint(rewritten()[0].state_dict(), plan=other_plan()),
        "no plan that fits",
    ),
    "half a checkpoint": (lambda: tdfx.merge_checkpoint(damaged()), "no plan that fits that says"),
    "no mapping": (lambda: tdfx.merge_checkpoint({"epoch": 3}), "holds no tensor under the names 'epoch'"),
    "a plan's text": (lambda: tdfx.merge_checkpoint({}, plan="plan.json"), "is a str, not a plan"),  # type: ignore[arg-type]
    "nothing there": (
        lambda: tdfx.merge_checkpoint("no.pt"),
        "The checkpoint 'no.pt' could not be read: FileNotFoundError",
    ),
    "no weights": (lambda: tdfx.merge_checkpoint("."), r"holds no model.safetensors and no pytorch_model.bin"),
    "an odd ending": (
        lambda: tdfx.merge_checkpoint({}, "dense.npz"),
        "'dense.npz' has none of the endings .safetensors",
    ),
    "no folder": (
        lambda: tdfx.merge_checkpoint({}, "no/dense.pt"),
        "Cannot write 'no/dense.pt'. Name a file in a folder",
    ),
    "a folder for a file": (
        lambda: tdfx.merge_checkpoint({"w": torch.ones(2)}, "dense", plan=other_plan()),
        "what was read is no folder with a config.json",
    ),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuses_end_in_one_clear_error(name: str) -> None:
    call, message = MISUSES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(tdfx.CheckpointError, match=message):
            call()
    assert list(Path().iterdir()) == []


def test_the_checkpoint_itself_is_never_overwritten() -> None:
    torch.save(Net().state_dict(), "w.pt")
    before = Path("w.pt").read_bytes()
    assert "'w.pt' is the checkpoint itself, which is kept" in command("w.pt", "-o", "w.pt", code=2)
    assert Path("w.pt").read_bytes() == before


class Settings:
    """A class of the user's, as hyperparameters hold."""


def test_code_runs_only_if_the_file_is_trusted() -> None:
    torch.save({"state_dict": Net().state_dict(), "hyper_parameters": Settings()}, "w.pt")
    assert "holds more than tensors, and code in a file is not run" in command("w.pt", "-o", "d.pt", code=2)
    assert "nothing to merge" in command("w.pt", "-o", "d.pt", "--trusted")


def test_inspect_reads_factorized_weights() -> None:
    model, plan, _ = rewritten()
    Path("nets.py").write_text("from test_merge_checkpoint import Net as build\n")
    beside_a_switch(model.state_dict(), plan)
    run = CliRunner().invoke(
        main,
        ["inspect", "nets.py:build", "--weights", "w.pt", "--json", "-", "--policy", "ratio:0.5", "--min-gain", "0"],
    )
    assert run.exit_code == 0, run.output
    errors = {site.name: site.error for site in tdfx.Plan.from_json(run.stdout)}
    assert errors["head"] is not None
    assert errors["head"] < 1e-5  # it is of that rank already
    torch.save(model.state_dict(), "w.pt")
    refused = CliRunner().invoke(main, ["inspect", "nets.py:build", "--weights", "w.pt"])
    assert "do not fit Net: the checkpoint holds factors of 6 layers" in " ".join(refused.output.split())
