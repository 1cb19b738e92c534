"""The Trainer of Transformers with the callback: training, the switch, resuming to the same bits, merging, saving."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import tdfx
from tdfx.layers.factorized import Factorized

transformers = pytest.importorskip(
    "transformers", reason="Transformers is not installed: pip install 'tdfx[transformers]'"
)
pytest.importorskip("accelerate", reason="Accelerate is not installed: pip install 'tdfx[transformers]'")

from tdfx.integrations.pretrained import FILE  # noqa: E402
from tdfx.integrations.transformers import SwitchCallback  # noqa: E402

POLICY = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0)
PER_EPOCH = 4

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """Forget the precision and the compiler that Transformers 4 puts there, for all Trainers that follow."""
    with mock.patch.dict(os.environ):
        yield


def bert() -> Any:
    settings = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "num_labels": 3}
    config = transformers.BertConfig(vocab_size=64, hidden_size=32, max_position_embeddings=16, **settings)
    return transformers.BertForSequenceClassification(config)


def gpt2() -> Any:
    settings = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, **settings))


class Sentences(torch.utils.data.Dataset[dict[str, Any]]):
    """Random token sequences, labelled with a class or with themselves."""

    def __init__(self, *, of_tokens: bool) -> None:
        self.of_tokens = of_tokens

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(64, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids if self.of_tokens else int(ids[0]) % 3}


def make_trainer(folder: Path, model: Any, callback: SwitchCallback | None, **settings: Any) -> Any:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 32 // PER_EPOCH,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "save_strategy": "epoch",
        "logging_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = transformers.TrainingArguments(output_dir=str(folder), **{**defaults, **settings})
    data = Sentences(of_tokens=not hasattr(model, "bert"))
    callbacks = [] if callback is None else [callback]
    return transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks)


def make_callback(**settings: Any) -> SwitchCallback:
    return SwitchCallback(POLICY, **{"epoch": 1, "merge": False, "total_steps": None, **settings})


def sites(model: nn.Module) -> int:
    return sum(isinstance(module, Factorized) for module in model.modules())


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


def trained(build: Any, folder: Path, seed: int = 0, resume: Path | None = None, **settings: Any) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    model, callback = build(), make_callback(**settings.pop("callback", {}))
    trainer = make_trainer(folder, model, callback, **settings)
    trainer.train(resume_from_checkpoint=None if resume is None else callback.resume(trainer, resume))
    return model, trainer


def weights_of(folder: Path) -> list[str]:
    """Return the keys of the weights in a checkpoint."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


def outputs(model: Any) -> Tensor:
    ids = torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=ids).logits
    return logits


@pytest.mark.parametrize("build", [bert, gpt2])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, build: Any) -> None:
    uninterrupted, trainer = trained(build, tmp_path / "whole")
    assert sites(uninterrupted) > 3
    for step in (PER_EPOCH, 2 * PER_EPOCH):
        folder = tmp_path / "whole" / f"checkpoint-{step}"
        resumed, resumed_trainer = trained(build, tmp_path / "again", seed=1, resume=folder)
        assert same(uninterrupted, resumed)
        assert resumed_trainer.lr_scheduler.get_last_lr() == trainer.lr_scheduler.get_last_lr()


def test_a_run_that_is_resumed_from_before_the_switch_ends_with_the_same_bits(tmp_path: Path) -> None:
    late: Any = {"callback": {"epoch": None, "when": tdfx.AtStep(PER_EPOCH + 2), "rewarm": 3}}
    uninterrupted, _ = trained(bert, tmp_path / "whole", **late)
    folder = tmp_path / "whole" / f"checkpoint-{PER_EPOCH}"
    late = {"callback": {"epoch": None, "when": tdfx.AtStep(PER_EPOCH + 2), "rewarm": 3}}
    resumed, _ = trained(bert, tmp_path / "again", seed=1, resume=folder, **late)
    assert sites(resumed) > 3
    assert same(uninterrupted, resumed)


def test_a_training_too_short_for_a_switch_is_not_switched(tmp_path: Path) -> None:
    model, callback = bert(), SwitchCallback(POLICY, epoch=1)
    make_trainer(tmp_path, model, callback).train()
    (event,) = callback.switch.events
    assert (event.what, sites(model), callback.switch.total_steps) == ("too_late", 0, 3 * PER_EPOCH)
    assert f"in the {2 * PER_EPOCH} steps left" in event.why


def test_the_steps_left_are_counted_from_the_trainers_step(tmp_path: Path) -> None:
    model, callback = bert(), SwitchCallback(POLICY, when=tdfx.AtStep(3 * PER_EPOCH + 2))
    for _ in range(2):
        make_trainer(tmp_path, model, callback).train()
    (event,) = callback.switch.events
    assert f"in the {3 * PER_EPOCH - 2} steps left" in event.why


def test_an_optimizer_that_the_user_passed_resumes(tmp_path: Path) -> None:
    def run(folder: Path, resume: Path | None) -> Any:
        torch.manual_seed(0)
        model, callback = bert(), make_callback()
        trainer = make_trainer(folder, model, callback)
        trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        trainer.train(resume_from_checkpoint=None if resume is None else callback.resume(trainer, resume))
        return model

    uninterrupted = run(tmp_path / "whole", None)
    resumed = run(tmp_path / "again", tmp_path / "whole" / f"checkpoint-{2 * PER_EPOCH}")
    assert same(uninterrupted, resumed)


@pytest.mark.parametrize("build", [bert, gpt2])
def test_it_merges_and_saves_a_model_for_from_pretrained(tmp_path: Path, build: Any) -> None:
    torch.manual_seed(0)
    model, callback = build(), make_callback(merge=True)
    trainer = make_trainer(tmp_path, model, callback)
    trainer.train()
    assert [(event.step, event.what) for event in callback.switch.events] == [(PER_EPOCH, "switched")]
    assert sites(model) == 0
    assert list(model.state_dict()) == list(build().state_dict())
    trainer.save_model(str(tmp_path / "saved"))
    loaded = type(model).from_pretrained(str(tmp_path / "saved"))
    assert torch.equal(outputs(loaded), outputs(model))
    inner = trainer.optimizer.optimizer
    held = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    assert all("exp_avg" in inner.state[parameter] for parameter in model.parameters())


def test_with_accumulation_the_switch_is_at_the_end_of_the_epoch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    callback = make_callback()
    make_trainer(tmp_path, bert(), callback, gradient_accumulation_steps=2, save_strategy="no").train()
    assert [(event.step, event.what) for event in callback.switch.events] == [(PER_EPOCH // 2, "switched")]


def test_bf16_autocast_is_kept(tmp_path: Path) -> None:
    model, _ = trained(bert, tmp_path, bf16=True, save_strategy="no")
    seen: list[torch.dtype] = []
    model.classifier.register_forward_hook(lambda layer, x, out: seen.append(out.dtype))
    outputs(model)
    assert sites(model) > 3
    assert seen == [torch.bfloat16]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_compiled_model_is_compiled_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, callback = bert(), make_callback()
    trainer = make_trainer(
        tmp_path, model, callback, torch_compile=True, torch_compile_backend="eager", save_strategy="no"
    )
    trainer.train()
    assert sites(model) > 3
    assert callback.switch.plan is not None
    # FLOPs are counted only with example inputs, which the callback took from the first batch.
    assert callback.switch.plan.flops_before
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer.train()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(moved)


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "left"])
@pytest.mark.parametrize("best", [PER_EPOCH - 2, 3 * PER_EPOCH - 2])
def test_the_best_checkpoint_is_loaded_at_the_end_whatever_its_form(tmp_path: Path, best: int, merge: bool) -> None:
    """The best checkpoint is from before or after the switch; the trained model has its outputs, merged if asked for."""

    def score(prediction: Any) -> dict[str, float]:
        return {"closeness": -abs(trainer.state.global_step - best)}

    torch.manual_seed(0)
    model, callback = bert(), make_callback(merge=merge)
    settings = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    trainer = make_trainer(
        tmp_path, model, callback, metric_for_best_model="closeness", load_best_model_at_end=True, **settings
    )
    trainer.compute_metrics = score
    trainer.train()
    assert (sites(model) > 3) == (best > PER_EPOCH and not merge)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    expected = bert()
    other = make_callback()
    other.resume(make_trainer(tmp_path / "other", expected, other), tmp_path / f"checkpoint-{best}")
    state = transformers.trainer.safetensors.torch.load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    expected.load_state_dict(state)
    assert (sites(expected) > 3) == (best > PER_EPOCH)
    torch.testing.assert_close(outputs(model), outputs(expected), rtol=1e-4, atol=1e-5)


class Endless(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Data without a length."""

    def __iter__(self) -> Any:
        while True:
            yield from (Sentences(of_tokens=False)[index] for index in range(32))


def test_data_without_a_length_need_a_switch_at_a_step(tmp_path: Path) -> None:
    for callback in (make_callback(), make_callback(epoch=None, when=tdfx.AtStep(2))):
        model = bert()
        trainer = make_trainer(tmp_path, model, callback, max_steps=3, save_strategy="no")
        trainer.train_dataset = Endless()
        if callback.switch.when == tdfx.AtStep(2):
            trainer.train()
            assert sites(model) > 3
        else:
            with pytest.raises(tdfx.ModelError, match=r"no length.*when=tdfx.AtStep"):
                trainer.train()


def test_resuming_without_callback_resume_is_refused(tmp_path: Path) -> None:
    trained(bert, tmp_path)
    before = make_trainer(tmp_path, bert(), make_callback())
    with pytest.raises(tdfx.CheckpointError, match=r"goes on from step 4.*callback.resume\(trainer, checkpoint\)"):
        before.train(resume_from_checkpoint=_dense(tmp_path))
    model = bert()
    after = make_trainer(tmp_path, model, make_callback())
    with pytest.raises(tdfx.CheckpointError, match=r"holds factors of 8 sites.*callback.resume"):
        after.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{3 * PER_EPOCH}"))
    assert sites(model) == 0


def _dense(folder: Path) -> str:
    """Return a checkpoint of a run without the callback."""
    make_trainer(folder / "dense", bert(), None, num_train_epochs=1).train()
    return str(folder / "dense" / f"checkpoint-{PER_EPOCH}")


def test_a_checkpoint_without_the_callback_is_refused(tmp_path: Path) -> None:
    callback = make_callback()
    trainer = make_trainer(tmp_path, bert(), callback)
    with pytest.raises(tdfx.CheckpointError, match="There is no checkpoint in"):
        callback.resume(trainer)
    with pytest.raises(tdfx.CheckpointError, match=f"holds no {FILE}"):
        callback.resume(trainer, _dense(tmp_path))
