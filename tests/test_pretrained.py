"""Factorized models of Transformers that are saved and loaded as others are: no layer is left at random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tdfx

pytest.importorskip("transformers", reason="Transformers is not installed: pip install 'tdfx[transformers]'")
pytest.importorskip("accelerate", reason="Accelerate is not installed: pip install 'tdfx[transformers]'")

import test_transformers as hf

from tdfx.integrations.transformers import load_pretrained

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_a_factorized_model_is_loaded(tmp_path: Path) -> None:
    model, _ = hf.trained(hf.bert, tmp_path)
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert hf.sites(loaded) == hf.sites(model) > 3
    assert hf.same(loaded, model)
    torch.testing.assert_close(hf.outputs(loaded), hf.outputs(model))
    assert not loaded.is_quantized
    # It can be saved again, and trained.
    loaded.save_pretrained(tmp_path / "again")
    assert hf.same(type(model).from_pretrained(tmp_path / "again"), model)
    hf.make_trainer(tmp_path / "more", loaded, hf.make_callback(merge=True), max_steps=1).train()
    assert hf.sites(loaded) == 0
    loaded.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_a_folder_is_loaded_dense(tmp_path: Path) -> None:
    model, _ = hf.trained(hf.bert, tmp_path)
    for folder in (tmp_path / "saved", tmp_path / f"checkpoint-{3 * hf.PER_EPOCH}"):
        model.save_pretrained(folder)
        dense = load_pretrained(folder)
        assert hf.sites(dense) == 0
        torch.testing.assert_close(hf.outputs(dense), hf.outputs(model))
        assert hf.same(load_pretrained(folder, merged=False), model)


def test_a_checkpoint_of_an_earlier_version_is_loaded(tmp_path: Path) -> None:
    model, _ = hf.trained(hf.bert, tmp_path)
    folder = tmp_path / f"checkpoint-{3 * hf.PER_EPOCH}"
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(hf.outputs(load_pretrained(folder)), hf.outputs(model))
    config["architectures"] = ["Mine"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(tdfx.CheckpointError, match=r"architecture 'Mine'.*load_pretrained\(folder, MyModel\)"):
        load_pretrained(folder)


def test_the_last_checkpoint_is_dense(tmp_path: Path) -> None:
    """Also if another callback, after this one, stops the training."""
    import transformers

    class Stop(transformers.TrainerCallback):  # type: ignore[misc]
        def on_evaluate(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            control.should_training_stop = state.global_step == 2 * hf.PER_EPOCH

    for others, last in (([], 3), ([Stop()], 2)):
        folder = tmp_path / str(last)
        trainer = hf.make_trainer(folder, hf.bert(), hf.make_callback(merge=True), eval_strategy="epoch")
        for callback in others:
            trainer.add_callback(callback)
        trainer.train()
        assert hf.sites(trainer.model) == 0
        checkpoint = folder / f"checkpoint-{last * hf.PER_EPOCH}"
        assert "factors" not in "".join(hf.weights_of(checkpoint))
        assert "factors" in "".join(hf.weights_of(folder / f"checkpoint-{hf.PER_EPOCH}"))
        saved = hf.transformers.BertForSequenceClassification.from_pretrained(checkpoint)
        torch.testing.assert_close(hf.outputs(saved), hf.outputs(trainer.model))
