"""Checks of the callbacks on two processes, in DDP over gloo; test_trainers_processes.py starts them."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import trainers_engines
import two_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import tdfx
from tdfx.integrations.adapter import TrainerAdapter
from tdfx.layers.factorized import Factorized
from tdfx.wrappers.in_place import InPlaceModule

WHOLE: dict[str, dict[str, torch.Tensor]] = {}
"""State at the end of each run without interruption."""


def sites(model: nn.Module) -> int:
    return sum(isinstance(module, Factorized) for module in model.modules())


def check_bits(model: nn.Module) -> None:
    """Check that both processes hold the same parameters."""
    values = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    gathered = [torch.empty_like(values), torch.empty_like(values)]
    dist.all_gather(gathered, values)
    assert torch.equal(*gathered)


def check_same(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    assert list(model.state_dict()) == list(state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def lightning_run(
    folder: Path, *, epochs: int = 3, ckpt: Path | None = None, save: Path | None = None, when: Any = None
) -> Any:
    import lightning.pytorch as pl
    from test_lightning import POLICY, Classifier, loader

    from tdfx.integrations.lightning import SwitchCallback

    class CheckWrapper(pl.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            assert isinstance(trainer.strategy.model, DistributedDataParallel)
            assert trainer.strategy.model.module is pl_module

    torch.manual_seed(0)
    moment: dict[str, Any] = {"epoch": 1} if when is None else {"when": when}
    module, callback = Classifier(steps=6), SwitchCallback(POLICY, **moment, merge=False, total_steps=None)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings: dict[str, Any] = {"accelerator": "cpu", "strategy": "ddp", "devices": 2, "enable_checkpointing": False}
    callbacks = [callback, CheckWrapper()]
    trainer = pl.Trainer(default_root_dir=folder, max_epochs=epochs, callbacks=callbacks, **quiet, **settings)
    trainer.fit(module, loader(), ckpt_path=ckpt)
    if save is not None:
        trainer.save_checkpoint(save)
    return module


def check_lightning_trains_alike(folder: Path) -> None:
    """Each process sees half of the data, and both hold the same weights."""
    module = lightning_run(folder)
    assert sites(module) == 3
    check_bits(module)
    WHOLE["lightning"] = {key: value.clone() for key, value in module.state_dict().items()}


def check_lightning_resumes(folder: Path) -> None:
    """A run that is resumed after the switch ends with the same bits."""
    lightning_run(folder, epochs=2, save=folder / "lightning.ckpt")
    resumed = lightning_run(folder, ckpt=folder / "lightning.ckpt")
    check_same(resumed, WHOLE["lightning"])


def check_lightning_resumes_while_it_collects(folder: Path) -> None:
    """The processes have seen other data, and one of them writes the checkpoint from which both go on."""
    when = tdfx.AtStep(5)
    lightning_run(folder, epochs=1, save=folder / "collecting.ckpt", when=when)
    (state,) = torch.load(folder / "collecting.ckpt", weights_only=False)["callbacks"].values()
    assert state["switch"]["moments"]["units"] == 2
    runs = [lightning_run(folder, ckpt=folder / "collecting.ckpt", when=when) for _ in range(2)]
    assert sites(runs[0]) == 3
    check_bits(runs[0])
    check_same(runs[1], runs[0].state_dict())


def transformers_run(folder: Path, *, resume: Path | None = None, merge: bool = False, **settings: Any) -> Any:
    from test_transformers import bert, make_callback, make_trainer

    torch.manual_seed(0)
    model, callback = bert(), make_callback(merge=merge, **settings)
    trainer = make_trainer(folder, model, callback, ddp_find_unused_parameters=False, per_device_train_batch_size=4)
    trainer.train(resume_from_checkpoint=None if resume is None else callback.resume(trainer, resume))
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    assert trainer.model_wrapped.module is model
    return model


def check_transformers_trains_alike(folder: Path) -> None:
    """DDP reduces the gradients of the factors."""
    model = transformers_run(folder / "whole")
    assert sites(model) > 3
    check_bits(model)
    WHOLE["transformers"] = {key: value.clone() for key, value in model.state_dict().items()}


def check_transformers_resumes(folder: Path) -> None:
    """A run that is resumed after the switch ends with the same bits."""
    resumed = transformers_run(folder / "again", resume=folder / "whole" / "checkpoint-8")
    check_same(resumed, WHOLE["transformers"])


def check_transformers_resumes_while_it_collects(folder: Path) -> None:
    """A run that is killed while it collects ends with the same bits."""
    early: dict[str, Any] = {"epoch": None, "when": tdfx.AtStep(6)}
    whole = transformers_run(folder / "early", **early)
    assert sites(whole) > 3
    state = {key: value.clone() for key, value in whole.state_dict().items()}
    resumed = transformers_run(folder / "again", resume=folder / "early" / "checkpoint-4", **early)
    check_same(resumed, state)


def check_transformers_merges(folder: Path) -> None:
    """Both processes merge at the end."""
    model = transformers_run(folder / "merged", merge=True)
    assert sites(model) == 0
    check_bits(model)


def check_an_unwrapped_model_is_refused(folder: Path) -> None:
    """Both processes refuse it before a step is counted."""
    net = nn.Sequential(nn.Linear(8, 8))
    callback = TrainerAdapter(epoch=1)
    with pytest.raises(tdfx.ModelError, match="2 processes train this Sequential, and it is neither in"):
        callback.step(InPlaceModule(net), [torch.optim.SGD(net.parameters(), lr=0.1)])


def check_a_sharded_model_is_rewritten_in_place(folder: Path) -> None:
    """Model and part stay the objects that they were, are sharded, and a failure before that changes nothing."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    holder, mesh = nn.Sequential(net, nn.Linear(8, 2)).double(), init_device_mesh("cpu", (2,))
    fully_shard(net[2], mesh=mesh)
    fully_shard(holder, mesh=mesh)
    optimizer = torch.optim.AdamW(holder.parameters(), 0.01)
    x = torch.randn(4, 8, dtype=torch.float64)
    holder(x).square().mean().backward()
    optimizer.step()
    expected, part = holder(x).detach(), InPlaceModule(holder, "0")
    policy = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)
    with pytest.raises(tdfx.OptimizerError):
        tdfx.rewrite(part, policy, emit="modules", optimizer=torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1))
    torch.testing.assert_close(holder(x).detach(), expected, rtol=0, atol=0)
    part.replace_with(tdfx.rewrite(part, policy, emit="modules", optimizer=optimizer))
    assert holder[0] is net
    assert sites(net) == 2
    for model in (holder, net[2]):
        assert isinstance(model, FSDPModule)
    torch.testing.assert_close(holder(x).detach(), expected)
    holder(x).square().mean().backward()
    optimizer.step()
    part.reshard()
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in holder.parameters()}
    part.replace_with(tdfx.merge(part, optimizer=optimizer))
    assert sites(net) == 0
    assert isinstance(net[2], FSDPModule)


CHECKS: dict[str, Callable[..., None]] = {
    name: check for name, check in list(globals().items()) if name.startswith("check_") and name.count("_") > 1
} | trainers_engines.CHECKS
NEEDS = {"lightning": ("lightning",), "transformers": ("transformers", "accelerate")}
"""Word in the name of a check -> packages that it needs."""


def installed(name: str) -> bool:
    """Return whether the packages that a check needs are installed."""
    return all(
        importlib.util.find_spec(package) is not None for word in NEEDS if word in name for package in NEEDS[word]
    )


def prepare() -> tuple[Path]:
    """Return the folder, and ignore the warnings of the frameworks."""
    warnings.simplefilter("ignore")
    return (Path(sys.argv[1]),)


if __name__ == "__main__":
    two_processes.run(Path(sys.argv[1]), prepare, {name: check for name, check in CHECKS.items() if installed(name)})
