"""torch.nn's own attention and transformer blocks: their projections are sites, and all that they compute stays the same."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam
from torchvision.models import VisionTransformer

import tdfx
from tdfx.layers.parameter import FactorizedParameter

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0)
LOW = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1)
TOLERANCE = 1e5 * torch.finfo(torch.float64).eps  # a chain of d layers rounds about d times
FLOAT64: dict[str, Any] = {"dtype": torch.float64}
every_mode = pytest.mark.parametrize("mode", [True, False])
pytestmark = pytest.mark.filterwarnings("ignore:.*(nested tensors|enable_nested_tensor)")


def rand(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **FLOAT64)


class Attention(nn.Module):
    """An attention with fixed arguments; the weights come back too, where it computes them."""

    def __init__(self, settings: dict[str, Any], inputs: Callable[[Tensor], tuple[Tensor, ...]], **named: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **settings, **FLOAT64)
        self.inputs, self.named = inputs, named

    def forward(self, x: Tensor) -> Tensor:
        out, weights = self.attention(*self.inputs(x), **self.named)
        return out.sum() if weights is None else out.sum() + (weights**2).sum()  # type: ignore[no-any-return]


def same(x: Tensor) -> tuple[Tensor, ...]:
    return x, x, x


def crossing(x: Tensor) -> tuple[Tensor, ...]:
    return x[:, :3], x, x


def different(x: Tensor) -> tuple[Tensor, ...]:
    return x[:, :3], x, x.flip(1)


def unbatched(x: Tensor) -> tuple[Tensor, ...]:
    return x[0], x[0], x[0]


def narrow(x: Tensor) -> tuple[Tensor, ...]:
    return x, x[..., :6], x[..., :4]


PADDED = torch.arange(5) > torch.tensor([[4], [3], [2]])
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
CASES: dict[str, Callable[[], Attention]] = {
    "self": lambda: Attention({"batch_first": True}, same),
    "sequence first": lambda: Attention({}, same, need_weights=False),
    "weights of each head": lambda: Attention({"batch_first": True}, same, average_attn_weights=False),
    "no bias": lambda: Attention({"batch_first": True, "bias": False}, same),
    "cross": lambda: Attention({"batch_first": True}, crossing),
    "three inputs": lambda: Attention({"batch_first": True}, different, need_weights=False),
    "three inputs, no bias": lambda: Attention({"batch_first": True, "bias": False}, different),
    "unbatched": lambda: Attention({}, unbatched),
    "kdim and vdim": lambda: Attention({"batch_first": True, "kdim": 6, "vdim": 4}, narrow),
    "bias_kv and zeros": lambda: Attention({"batch_first": True, "add_bias_kv": True, "add_zero_attn": True}, same),
    "padding": lambda: Attention({"batch_first": True}, same, key_padding_mask=PADDED),
    "float mask": lambda: Attention({"batch_first": True}, same, attn_mask=rand(5, 5)),
    "causal": lambda: Attention({"batch_first": True}, same, attn_mask=CAUSAL, is_causal=True, need_weights=False),
    "dropout": lambda: Attention({"batch_first": True, "dropout": 0.3}, same),
}
every_case = pytest.mark.parametrize("case", CASES)


def run(model: nn.Module, mode: bool, *inputs: Tensor, **named: Any) -> dict[str, Tensor]:
    """Return the output, with and without gradients, and the gradients of a copy of the model."""
    copied = copy.deepcopy(model).train(mode)
    x, *others = (each.clone().requires_grad_() for each in inputs)
    results = {}
    torch.manual_seed(7)
    results["output"] = copied(x, *others, **named)
    results["output"].square().sum().backward()
    torch.manual_seed(7)
    with torch.no_grad():
        results["without gradients"] = copied(x, *others, **named)
    assert x.grad is not None
    results["input"] = x.grad
    return results | {name: each.grad for name, each in copied.named_parameters() if each.grad is not None}


def check_same_run(model: nn.Module, dense: nn.Module, mode: bool, *inputs: Tensor, **named: Any) -> None:
    result, expected = run(model, mode, *inputs, **named), run(dense, mode, *inputs, **named)
    for name in result.keys() & expected.keys():
        assert torch.allclose(result[name], expected[name], rtol=TOLERANCE, atol=TOLERANCE), name


def check_merge(rewritten: nn.Module, dense: nn.Module) -> None:
    merged = tdfx.merge(rewritten)
    assert list(merged.state_dict()) == list(dense.state_dict())
    assert str(merged) == str(dense)
    for name, value in dense.state_dict().items():
        assert torch.allclose(merged.state_dict()[name], value, rtol=0, atol=TOLERANCE), name


@every_case
@pytest.mark.parametrize("observed", [True, False])
def test_full_rank_changes_nothing(case: str, observed: bool) -> None:
    dense, x = CASES[case](), rand(3, 5, 8)
    plan = tdfx.plan(dense, FULL, example_inputs=x if observed else None)
    assert {site.parameter for site in plan} == {
        f"attention.{name}" for name, _ in dense.attention.named_parameters() if "weight" in name
    }
    assert not plan.kept
    full = tdfx.rewrite(dense, plan)
    for mode in (True, False):
        check_same_run(full, dense, mode, x)
    check_merge(full, dense)
    assert type(tdfx.merge(full).attention) is nn.MultiheadAttention


@every_case
def test_the_factors_are_called_and_never_joined(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, x = CASES[case](), rand(3, 5, 8)
    low = tdfx.rewrite(dense, LOW, example_inputs=x)
    assert abs(float((low(x) - dense(x)).detach())) > 1e-3

    def joined(self: object, *factors: Tensor) -> Tensor:
        raise AssertionError("the dense weight was joined")

    monkeypatch.setattr(FactorizedParameter, "join", joined)
    for mode in (True, False):
        low.train(mode)(x).backward()
        with torch.no_grad():
            low(x)


def test_an_attention_with_several_inputs_is_a_map_of_three_groups() -> None:
    plans = [tdfx.plan(CASES[case](), FULL, example_inputs=rand(3, 5, 8)) for case in ("self", "cross")]
    sites = [plan["attention.in_proj_weight"] for plan in plans]
    assert [(site.kind, site.groups, site.shape) for site in sites] == [
        ("F.linear", 1, (24, 8)),
        ("attention", 3, (24, 8)),
    ]
    assert [site.flops_before for site in sites] == [2 * 15 * 8 * 24, 2 * (9 + 15 + 15) * 8 * 8]


BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], int]] = {
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, **FLOAT64), ((3, 5, 8),), 4),
    "norm first": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.2, batch_first=True, norm_first=True, **FLOAT64),
        ((3, 5, 8),),
        4,
    ),
    "decoder layer": (
        lambda: nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True, **FLOAT64),
        ((3, 4, 8), (3, 5, 8)),
        6,
    ),
    "transformer": (lambda: nn.Transformer(8, 2, 1, 1, 16, 0.0, **FLOAT64), ((5, 3, 8), (4, 3, 8)), 10),
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("observed", [True, False])
def test_blocks_of_torch_are_rewritten_whole(block: str, observed: bool) -> None:
    build, shapes, count = BLOCKS[block]
    dense, inputs = build(), tuple(rand(*shape, seed=index) for index, shape in enumerate(shapes))
    plan = tdfx.plan(dense, FULL, example_inputs=inputs if observed else None)
    assert (len(plan.factorized), len(plan.kept)) == (count, 0)
    full = tdfx.rewrite(dense, plan)
    for mode in (True, False):
        check_same_run(full, dense, mode, *inputs)
    check_merge(full, dense)
    low = tdfx.rewrite(dense, LOW, example_inputs=inputs)
    assert float((low(*inputs) - dense(*inputs)).detach().abs().max()) > 1e-3


def encoder(**settings: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, **FLOAT64)
    built = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8, **FLOAT64), **settings)
    for index, parameter in enumerate(built.parameters()):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(index))
    return built


@pytest.mark.parametrize("kept", [(), ("layers.0*",), ("layers.1*",)])
def test_an_encoder_computes_padded_batches_as_before(kept: tuple[str, ...]) -> None:
    """In eval mode without gradients torch packs them into nested tensors, with other outputs at padded positions."""
    dense, x = encoder(), rand(3, 5, 8)
    full = tdfx.rewrite(dense, tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, exclude=kept), example_inputs=x)
    for mode in (True, False):
        check_same_run(full, dense, mode, x, src_key_padding_mask=PADDED)
    results = run(dense, False, x, src_key_padding_mask=PADDED)
    assert not torch.allclose(results["output"], results["without gradients"])
    check_merge(full, dense)
    assert type(tdfx.merge(full)) is nn.TransformerEncoder
    assert isinstance(pickle.loads(pickle.dumps(full)), nn.TransformerEncoder)


def test_optimizer_state_of_a_packed_projection_is_carried_both_ways() -> None:
    dense, x = CASES["cross"](), rand(3, 5, 8)
    optimizer = Adam(dense.parameters())
    dense(x).backward()
    optimizer.step()
    packed = dense.attention.in_proj_weight
    before = copy.deepcopy(optimizer.state[packed])
    names = [name for name, _ in dense.named_parameters()]
    full = tdfx.rewrite(dense, FULL, example_inputs=x, optimizer=optimizer, carry_state=True)
    assert {id(each) for each in optimizer.param_groups[0]["params"]} == {id(each) for each in full.parameters()}
    merged: Any = tdfx.merge(full, optimizer=optimizer)
    assert [name for name, _ in merged.named_parameters()] == names
    after = optimizer.state[merged.attention.in_proj_weight]
    assert torch.allclose(after["exp_avg"], before["exp_avg"], atol=TOLERANCE)
    assert after["step"] == before["step"]


def test_moments_are_recorded_within_an_attention() -> None:
    model = CASES["kdim and vdim"]()
    x = rand(3, 5, 8)
    with tdfx.Moments(model) as moments:
        model(x).backward()
    site = moments.of("attention.k_proj_weight")
    assert site is not None
    rows = x[..., :6].reshape(-1, 6)
    assert torch.allclose(site.inputs[0], rows.mT @ rows / len(rows))  # type: ignore[index]
    assert moments.of("attention.out_proj.weight") is not None
    plan = tdfx.plan(model, LOW, example_inputs=x, moments=moments)
    assert {site.metric for site in plan} == {"loss"}


def test_copies_checkpoints_and_compiled_code_compute_the_same(tmp_path: Any) -> None:
    dense, x = CASES["three inputs"](), rand(3, 5, 8)
    low = tdfx.rewrite(dense, LOW, example_inputs=x)
    tdfx.save(low, tmp_path / "model.tdfx")
    loaded = tdfx.load(tmp_path / "model.tdfx", CASES["three inputs"])
    compiled = torch.compile(low, backend="eager", fullgraph=True)
    for other in (loaded, copy.deepcopy(low), compiled):
        assert torch.allclose(other(x), low(x), rtol=TOLERANCE)


def test_an_altered_projection_is_not_merged() -> None:
    low: Any = tdfx.rewrite(CASES["self"](), LOW, example_inputs=rand(3, 5, 8))
    low.attention.in_proj_weight.factors[0].register_forward_hook(lambda *_: None)
    with pytest.raises(tdfx.MergeError, match=r"attention\.in_proj_weight.*has a hook"):
        tdfx.merge(low)


def test_a_vision_transformer_is_rewritten_whole_and_verified() -> None:
    dense = VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=4).double().eval()
    nn.init.normal_(dense.heads[0].weight, generator=torch.Generator().manual_seed(1))
    x = rand(2, 3, 16, 16)
    plan = tdfx.plan(dense, FULL, example_inputs=x)
    assert len(plan.factorized) == len(plan) == 1 + 4 + 1
    full = tdfx.rewrite(dense, plan)
    for mode in (True, False):
        check_same_run(full, dense, mode, x)
    merged = tdfx.merge(full).float()  # ONNX Runtime has no GELU in float64
    assert tdfx.verify(merged, dense.float(), example_inputs=(x.float(),)).ok
