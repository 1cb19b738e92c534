"""What both trainers do on two processes, in DDP and in FSDP2; trainers_worker.py runs it.

Accelerate shards on accelerators only, so its test declares the CPU one. All else is the frameworks' own code.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import tdfx
from tdfx.layers.factorized import Factorized

PER_EPOCH = 2
"""Steps of an epoch on each of two processes."""
SWITCH = 3
"""The step of the switch, between two checkpoints."""
LONG = bool(os.environ.get("TDFX_LONG_TESTS"))
"""Whether to check every combination."""
NEVER: dict[str, Any] = {"recompile_seconds": 1e9, "total_steps": 6}
"""Settings of a switch that does not pay."""


class KilledError(Exception):
    """Ends a training in the middle."""


def sites(model: nn.Module) -> int:
    return sum(isinstance(module, Factorized) for module in model.modules())


def values(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all values, and check that both processes hold the same parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    state = {
        key: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for key, value in model.state_dict().items()
    }
    states: list[Any] = [None, None]
    dist.all_gather_object(states, state)
    assert all(torch.equal(states[0][key], states[1][key]) for key, _ in model.named_parameters())
    return state


def assert_same(state: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert list(state) == list(other)
    for key, value in state.items():
        # In FSDP2 each process has running statistics of its own, and the first one's are saved.
        if "running" not in key:
            torch.testing.assert_close(value, other[key], rtol=tolerance, atol=tolerance)


def assert_sharded(model: nn.Module, engine: str) -> None:
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters()) == (engine == "fsdp2")


# Lightning


def lightning_fit(
    folder: Path,
    engine: str,
    *,
    others: Any = (),
    ckpt: Path | None = None,
    at_once: bool = True,
    tensor_parallel: bool = False,
    policy: Any = None,
    **settings: Any,
) -> tuple[Any, Any]:
    """Train for three epochs, and save each in a file or a folder; return the module and the callback."""
    import lightning.pytorch as pl
    import test_lightning as lit
    from lightning.pytorch.strategies import ModelParallelStrategy

    from tdfx.integrations.lightning import SwitchCallback

    class Module(lit.Classifier):
        def configure_model(self) -> None:
            if engine == "fsdp2" and not tensor_parallel and not isinstance(self.model, FSDPModule):
                mesh = self.device_mesh["data_parallel"]
                fully_shard(self.model[4], mesh=mesh)
                fully_shard(self.model if at_once else self, mesh=mesh)

    torch.manual_seed(0)
    module = Module(steps=6)
    settings = {"when": tdfx.AtStep(SWITCH), "total_steps": None, **settings}
    callback = SwitchCallback(policy or lit.POLICY, **settings)
    saving = pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_last=True)
    sizes = {"data_parallel_size": 1 if tensor_parallel else 2, "tensor_parallel_size": 2 if tensor_parallel else 1}
    strategy = ModelParallelStrategy(**sizes, save_distributed_checkpoint=at_once) if engine == "fsdp2" else "ddp"
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_epochs=3,
        callbacks=[saving, callback, *others],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        strategy=strategy,
        devices=2,
    )
    trainer.fit(module, lit.loader(), ckpt_path=ckpt)
    return module, callback


def lightning_keys(path: Path) -> set[str]:
    """Return the keys of the weights in a checkpoint, a file or a folder of shards."""
    if path.is_dir():
        from torch.distributed.checkpoint.filesystem import FileSystemReader

        names = FileSystemReader(path).read_metadata().state_dict_metadata
        return {name.removeprefix("state_dict.") for name in names if name.startswith("state_dict.")}
    return set(torch.load(path, weights_only=True, mmap=True)["state_dict"])


WHOLE: dict[Any, dict[str, Tensor]] = {}


def lightning_trains(folder: Path, engine: str, *, at_once: bool = True) -> None:
    """It switches in the second epoch, and is dense at the end: the module, and the last checkpoint."""
    module, callback = lightning_fit(folder / "whole", engine, at_once=at_once)
    assert [event.step for event in callback.switch.events] == [SWITCH]
    assert callback.merged
    assert sites(module) == 0
    assert_sharded(module, engine)
    WHOLE["lightning", engine, at_once] = state = values(module)
    assert lightning_keys(folder / "whole" / "epoch=0.ckpt") == set(state)
    assert any("factors" in key for key in lightning_keys(folder / "whole" / "epoch=1.ckpt"))
    for name in ("epoch=2.ckpt", "last.ckpt"):
        assert lightning_keys(folder / "whole" / name) == set(state)
    # Both train on the same halves of the data.
    assert_same(state, WHOLE["lightning", "ddp", True], 1e-4)


def lightning_is_killed(folder: Path, engine: str, *, at_once: bool = True) -> None:
    """A run that is killed after the switch, or before it, ends with the same bits when it is resumed."""
    import lightning.pytorch as pl

    class Kill(pl.Callback):  # type: ignore[misc]
        def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
            if trainer.global_step == 2 * PER_EPOCH:
                raise KilledError

    with pytest.raises(KilledError):
        lightning_fit(folder / "killed", engine, others=[Kill()], at_once=at_once)
    for epoch in (0, 1):
        path = folder / "killed" / f"epoch={epoch}.ckpt"
        resumed, callback = lightning_fit(folder / f"resumed{epoch}", engine, ckpt=path, at_once=at_once)
        assert callback.merged
        assert_same(values(resumed), WHOLE["lightning", engine, at_once])


def lightning_is_too_late(folder: Path, engine: str) -> None:
    """Both processes keep a model for which a switch does not pay."""
    module, callback = lightning_fit(folder / "late", engine, **NEVER)
    assert [event.what for event in callback.switch.events] == ["too_late"]
    assert sites(module) == 0
    values(module)


def lightning_is_refused(folder: Path, engine: str) -> None:
    """A policy that names no layer is refused on both at the switch, and nothing has changed."""
    import lightning.pytorch as pl

    class Keep(pl.Callback):  # type: ignore[misc]
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            kept.extend([pl_module, [id(parameter) for parameter in pl_module.parameters()], trainer.optimizers[0]])

    kept: list[Any] = []
    wrong = tdfx.Policy(rank=tdfx.Ratio(of=0.25), exclude=("model.nothing",))
    with pytest.raises(tdfx.PolicyError, match=r"model\.nothing"):
        lightning_fit(folder / "refused", engine, others=[Keep()], policy=wrong)
    module, parameters, optimizer = kept
    assert sites(module) == 0
    assert parameters == [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]


# Transformers


def transformers_trainer(folder: Path, engine: str, callbacks: Any, sharded_files: bool = True, **settings: Any) -> Any:
    import test_transformers as hf
    import transformers

    class Sharding(transformers.Trainer):  # type: ignore[misc]
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            if engine != "ddp":
                from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

                state = self.accelerator.state
                state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
                state.distributed_type = DistributedType.FSDP
                self.is_fsdp_enabled = True
                get_state_dict = self.accelerator.get_state_dict
                # On CPUs the tensors of a full state_dict still wait for their collectives, and cannot be saved.
                self.accelerator.get_state_dict = lambda model: {
                    key: _plain(value) for key, value in get_state_dict(model).items()
                }

    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 32 // PER_EPOCH // 2,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "save_strategy": "epoch",
        "logging_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
    }
    if engine != "ddp":
        kind = "SHARDED_STATE_DICT" if sharded_files else "FULL_STATE_DICT"
        config = {"version": 2, "state_dict_type": kind}
        defaults |= {
            "fsdp": "full_shard auto_wrap",
            "fsdp_config": config | {"transformer_layer_cls_to_wrap": ["BertLayer"]},
        }
    torch.manual_seed(0)
    arguments = transformers.TrainingArguments(output_dir=str(folder), **{**defaults, **settings})
    data = hf.Sentences(of_tokens=False)
    return Sharding(hf.bert(), arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks)


def _plain(value: Any) -> Any:
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.wait() if isinstance(value, AsyncCollectiveTensor) else value


def transformers_callback(**settings: Any) -> Any:
    import test_transformers as hf

    return hf.make_callback(**{"epoch": None, "when": tdfx.AtStep(SWITCH), "merge": True, **settings})


def transformers_trains(folder: Path, engine: str, *, sharded_files: bool = True) -> None:
    """It switches in the second epoch, and is dense at the end: the model, the last checkpoint, and what is saved."""
    import transformers

    callback = transformers_callback()
    trainer = transformers_trainer(folder / "whole", engine, [callback], sharded_files)
    trainer.train()
    assert [event.step for event in callback.switch.events] == [SWITCH]
    assert sites(trainer.model) == 0
    assert_sharded(trainer.model, engine)
    WHOLE["transformers", engine] = state = values(trainer.model)
    assert_same(state, WHOLE["transformers", "ddp"], 1e-4)
    trainer.save_model(str(folder / "saved"))
    dist.barrier()
    for path in (
        (folder / "saved", folder / "whole" / f"checkpoint-{3 * PER_EPOCH}")
        if engine == "ddp" or not sharded_files
        else ()
    ):
        if engine == "ddp" or path.name == "saved":
            saved = transformers.BertForSequenceClassification.from_pretrained(path)
            assert_same(dict(saved.state_dict()), state)


def transformers_is_killed(folder: Path, engine: str, *, sharded_files: bool = True) -> None:
    """A run that is killed after the switch, or before it, ends with the same bits when it is resumed."""
    import transformers

    class Kill(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step == 2 * PER_EPOCH:
                raise KilledError

    with pytest.raises(KilledError):
        transformers_trainer(folder / "killed", engine, [transformers_callback(), Kill()], sharded_files).train()
    for step in (PER_EPOCH, 2 * PER_EPOCH):
        callback = transformers_callback()
        resumed = transformers_trainer(folder / f"resumed{step}", engine, [callback], sharded_files)
        resumed.train(resume_from_checkpoint=callback.resume(resumed, folder / "killed" / f"checkpoint-{step}"))
        assert_same(values(resumed.model), WHOLE["transformers", engine])


def transformers_loads_the_best(folder: Path, engine: str, *, best: int, sharded_files: bool = True) -> None:
    """The best checkpoint is from before the switch or after it; at the end the model is that one, dense."""
    from tdfx.integrations.transformers import load_pretrained

    scores = itertools.count()
    callback = transformers_callback()
    settings = {"eval_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "score"}
    trainer = transformers_trainer(folder / f"best{best}", engine, [callback], sharded_files, **settings)
    trainer.compute_metrics = lambda outputs: {"score": -abs(next(scores) + 1 - best)}
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best * PER_EPOCH}")
    assert sites(trainer.model) == 0
    assert_sharded(trainer.model, engine)
    state = values(trainer.model)
    if engine == "ddp":
        saved = load_pretrained(folder / f"best{best}" / f"checkpoint-{best * PER_EPOCH}")
        assert_same(dict(saved.state_dict()), state, 1e-6)


def transformers_is_too_late(folder: Path, engine: str) -> None:
    """Both processes keep a model for which a switch does not pay."""
    callback = transformers_callback(**NEVER)
    trainer = transformers_trainer(folder / "late", engine, [callback], save_strategy="no")
    trainer.train()
    assert [event.what for event in callback.switch.events] == ["too_late"]
    assert sites(trainer.model) == 0
    values(trainer.model)


def transformers_is_refused(folder: Path, engine: str) -> None:
    """A policy that names no layer is refused on both at the switch, and nothing has changed."""
    from tdfx.integrations.transformers import SwitchCallback

    wrong = SwitchCallback(tdfx.Policy(rank=tdfx.Ratio(of=0.25), exclude=("nothing",)), epoch=1, total_steps=None)
    trainer = transformers_trainer(folder / "refused", engine, [wrong], save_strategy="no")
    with pytest.raises(tdfx.PolicyError, match="nothing"):
        trainer.train()
    assert sites(trainer.model) == 0
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in trainer.model.parameters()}


# What is refused in the first second


def check_lightning_with_tensor_parallelism_is_refused(folder: Path) -> None:
    """Before a step, whatever the module."""
    steps: list[int] = []

    import lightning.pytorch as pl

    class Count(pl.Callback):  # type: ignore[misc]
        def on_train_batch_start(self, *rest: Any) -> None:
            steps.append(1)

    text = "2 processes train this Sequential, and it is neither in DistributedDataParallel nor sharded by fully_shard"
    with pytest.raises(tdfx.ModelError, match=text):
        lightning_fit(folder / "tp", "fsdp2", tensor_parallel=True, others=[Count()])
    assert not steps


def _named(name: str, check: Callable[..., None], engine: str) -> tuple[str, Callable[[Path], None]]:
    def run(folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(folder / name, engine)

    return name, run


_Check = Callable[..., None]


def _checks() -> Iterator[tuple[str, Callable[[Path], None]]]:
    check: _Check
    yield _named("check_lightning_trains_in_ddp", lightning_trains, "ddp")  # the others are compared with it
    for check in (lightning_trains, lightning_is_killed):
        yield _named(f"check_{check.__name__}_in_fsdp2", check, "fsdp2")
    # On CPUs, Accelerate can write full checkpoints of FSDP2, but waits for ever when it loads one.
    yield _named("check_transformers_trains_in_ddp", transformers_trains, "ddp")
    yield _named("check_transformers_trains_in_fsdp2", transformers_trains, "fsdp2")
    if LONG:
        yield from _more_checks()
    yield from [(name, check) for name, check in globals().items() if name.startswith("check_")]


def _more_checks() -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Yield the other combinations, which take some minutes."""
    check: _Check
    for check in (lightning_is_killed, transformers_is_killed, transformers_is_too_late):
        yield _named(f"check_{check.__name__}_in_ddp", check, "ddp")
    others = (transformers_is_killed, transformers_is_refused, transformers_is_too_late)
    for check in (lightning_is_too_late, lightning_is_refused, *others):
        yield _named(f"check_{check.__name__}_in_fsdp2", check, "fsdp2")
    yield _named("check_lightning_trains_in_fsdp2_by_file", partial(lightning_trains, at_once=False), "fsdp2")
    one_file = partial(transformers_trains, sharded_files=False)
    yield _named("check_transformers_trains_in_fsdp2_in_one_file", one_file, "fsdp2")
    for best, engine in itertools.product((1, 2), ("ddp", "fsdp2")):
        check_best = partial(transformers_loads_the_best, best=best)
        yield _named(f"check_transformers_loads_the_best_{best}_in_{engine}", check_best, engine)


CHECKS: dict[str, Callable[[Path], None]] = dict(_checks())
