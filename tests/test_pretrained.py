"""Factorized models of Transformers that are saved and loaded as others are: no layer is left at random."""

from __future__ import annotations

import json
import os
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


def vit() -> Any:
    settings = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "num_labels": 3}
    return hf.transformers.ViTForImageClassification(
        hf.transformers.ViTConfig(hidden_size=32, image_size=16, patch_size=8, **settings)
    )


def t5() -> Any:
    settings = {"num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    return hf.transformers.T5ForConditionalGeneration(
        hf.transformers.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, **settings)
    )


def mixtral() -> Any:
    settings = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    return hf.transformers.MixtralForCausalLM(
        hf.transformers.MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=64, **settings)
    )


def factorized(model: Any) -> Any:
    """Return a model with random values, also where Transformers begins with zeros, rewritten without a callback."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return tdfx.rewrite(model, HALF, emit="modules")


HALF = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, cost=tdfx.Modelled())


LONG = bool(os.environ.get("TDFX_LONG_TESTS"))


@pytest.mark.parametrize("build", [hf.gpt2, *(vit, t5, mixtral) * LONG])
def test_any_architecture_is_loaded_as_it_was_saved(tmp_path: Path, build: Any) -> None:
    model = factorized(build())
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert getattr(model.config, "quantization_config", None) is None
    loaded = type(model).from_pretrained(tmp_path)
    assert hf.sites(loaded) == hf.sites(model) > 3
    assert hf.same(loaded, model)
    assert not LONG or hf.same(load_pretrained(tmp_path), tdfx.merge(model))


def test_parts_and_wholes_are_loaded_for_one_another(tmp_path: Path) -> None:
    whole = hf.bert()
    whole.bert = factorized(whole.bert)
    sites = hf.sites(whole)
    whole.save_pretrained(tmp_path / "whole")
    assert hf.same(type(whole).from_pretrained(tmp_path / "whole"), whole)
    base = hf.transformers.AutoModel.from_pretrained(tmp_path / "whole")
    assert hf.sites(base) == sites > 3
    assert hf.same(base, whole.bert)
    if not LONG:
        return
    whole.bert.save_pretrained(tmp_path / "base")
    assert hf.same(hf.transformers.BertModel.from_pretrained(tmp_path / "base"), whole.bert)
    other_head = hf.transformers.BertForTokenClassification.from_pretrained(tmp_path / "whole")
    assert hf.sites(other_head) == sites - any("pooler" in name for name, _ in whole.named_modules())
    torch.testing.assert_close(
        other_head.bert.encoder.layer[0].output.dense.weight, whole.bert.encoder.layer[0].output.dense.weight
    )


def test_a_head_for_other_classes_is_new(tmp_path: Path) -> None:
    model = factorized(hf.bert())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert tuple(loaded.classifier.weight.shape) == (7, model.classifier.weight.shape[1])
    assert hf.sites(loaded.bert) == hf.sites(model.bert) > 3
    assert hf.same(loaded.bert, model.bert)


def test_without_this_package_nothing_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers import auto

    from tdfx.integrations import pretrained

    model = factorized(hf.bert())
    model.save_pretrained(tmp_path)
    assert "Import tdfx" in (tmp_path / "config.json").read_text()
    monkeypatch.setattr(auto.AutoHfQuantizer, "supports_quant_method", staticmethod(pretrained._supports))
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "tdfx")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "tdfx")
    for loaded_class in (type(model), hf.transformers.AutoModel):
        with pytest.raises(ValueError, match="quant_method"):
            loaded_class.from_pretrained(tmp_path)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    model = factorized(hf.bert())
    model.save_pretrained(tmp_path / "factorized")
    config = (tmp_path / "factorized" / "config.json").read_text()
    dense: Any = tdfx.merge(model)
    dense.save_pretrained(tmp_path / "dense")
    assert "tdfx" not in (tmp_path / "dense" / "config.json").read_text()
    (tmp_path / "dense" / "config.json").write_text(config)
    with pytest.raises(tdfx.CheckpointError, match=r"'bert.encoder.*' is factorized.* no such factors.*delete 'quant"):
        type(model).from_pretrained(tmp_path / "dense")


def test_a_quantized_model_with_factors_is_warned_of(tmp_path: Path) -> None:
    model = factorized(hf.bert())
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.warns(
        tdfx.TdfxWarning, match=r"BertForSequenceClassification is quantized and holds .*Save tdfx.merge"
    ):
        model.save_pretrained(tmp_path)
    assert "tdfx" not in (tmp_path / "config.json").read_text()


def test_a_model_that_was_pickled_is_described_too() -> None:
    """In a process in which nothing was rewritten."""
    import pickle

    from tdfx.layers import pretrained

    text = pickle.dumps(factorized(hf.bert()))
    base: Any = hf.transformers.PreTrainedModel
    wrapped = base.save_pretrained
    try:
        base.save_pretrained = wrapped.__wrapped__
        pickle.loads(text)
        assert hasattr(base.save_pretrained, pretrained._NOTE)
    finally:
        base.save_pretrained = wrapped
