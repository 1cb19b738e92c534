"""A plan survives JSON, refuses other JSON, and adds up its sites."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tdfx
from tdfx.errors import PlanError
from tdfx.plans.plan import Plan, Reason, SitePlan


class Net(nn.Module):
    """Two convolutions, a norm, a linear layer, and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.fc = nn.Linear(32, 10)
        self.spare = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv2(torch.relu(self.norm(self.conv1(x)))))
        out: Tensor = self.fc(y.mean((2, 3)))
        return out


POLICY = tdfx.Policy(rank=tdfx.Ratio(of=0.5), exclude=("conv1",), min_gain=0)


def make_plan(*, inputs: bool = True) -> Plan:
    return tdfx.plan(Net(), POLICY, example_inputs=torch.zeros(2, 3, 8, 8) if inputs else None)


def site(**changes: Any) -> SitePlan:
    settings: dict[str, Any] = {"name": "fc", "kind": "Linear", "shape": (8, 8), "calls": 1}
    counts = {"parameters_before": 64, "parameters_after": 32}
    return SitePlan(**{**settings, **counts, "scheme": "svd", "ranks": (2,), **changes})


def changed_json(**changes: Any) -> str:
    """Return the JSON of a plan with some fields of its first site set to other values."""
    data = json.loads(Plan(sites=(site(),)).to_json())
    data["sites"][0].update(changes)
    return json.dumps(data)


COUNTS = st.integers(0, 10**15)
RANKS = st.lists(st.integers(1, 4096), min_size=1, max_size=3).map(tuple)
DECISIONS = st.one_of(
    st.fixed_dictionaries({"scheme": st.sampled_from(["svd", "tucker2"]), "ranks": RANKS}),
    st.fixed_dictionaries({"reason": st.sampled_from(Reason)}),
)
FIELDS = st.fixed_dictionaries(
    {
        "name": st.text(),
        "kind": st.sampled_from(["Linear", "Conv2d"]),
        "shape": RANKS,
        "calls": COUNTS,
        "parameters_before": COUNTS,
        "parameters_after": COUNTS,
        "note": st.text(),
        "full_ranks": st.none() | RANKS,
        "flops_before": st.none() | COUNTS,
        "flops_after": st.none() | COUNTS,
        "gain": st.none() | st.floats(0, 100),
        "error": st.none() | st.floats(0, 1),
    }
)
SITES = st.builds(lambda fields, decision: SitePlan(**fields, **decision), FIELDS, DECISIONS)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
SITE_FIELDS = sorted(SitePlan.__dataclass_fields__)
PLAN_FIELDS = sorted(Plan.__dataclass_fields__)


def test_a_real_plan_comes_back_equal_from_json() -> None:
    plan = make_plan()
    assert plan.factorized
    assert plan.kept
    read = Plan.from_json(plan.to_json())
    assert read == plan
    assert read["conv1"].reason is Reason.EXCLUDED
    assert Plan.from_json(plan.to_json(indent=None)) == plan


def test_plans_that_differ_do_not_come_back_equal() -> None:
    assert Plan.from_json(changed_json(ranks=[3])) != Plan(sites=(site(),))


@settings(deadline=None)
@given(sites=st.lists(SITES, max_size=4), notes=st.lists(st.text()), emit=st.sampled_from(["graph", "modules"]))
def test_any_plan_comes_back_equal_from_json(sites: list[SitePlan], notes: list[str], emit: Any) -> None:
    plan = Plan(sites=tuple(sites), notes=tuple(notes), emit=emit, model="Net", policy="p", other_parameters=3)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("text", ["", "not json", "{", "[" * 100_000])
def test_text_that_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="it is not JSON"):
        Plan.from_json(text)


@pytest.mark.parametrize("text", ["null", "[]", '"plan"', "{}", '{"format": 2, "sites": []}', '{"format": "1"}'])
def test_json_of_another_format_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="this tdfx reads format 1"):
        Plan.from_json(text)


def test_an_unknown_field_of_a_site_is_refused_with_the_nearest() -> None:
    with pytest.raises(PlanError, match=r"Site 'fc' has the unknown field 'rank'. Nearest: 'ranks'"):
        Plan.from_json(changed_json(rank=[2]))


def test_an_unknown_field_of_the_plan_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match=r"The plan has the unknown field 'nodes'. Nearest: 'notes'"):
        Plan.from_json('{"format": 1, "sites": [], "nodes": 3}')


def test_a_missing_field_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match="'sites'"):
        Plan.from_json('{"format": 1}')
    with pytest.raises(PlanError, match="'parameters_before'"):
        Plan.from_json('{"format": 1, "sites": [{"name": "fc"}]}')


def test_an_unknown_reason_is_refused() -> None:
    with pytest.raises(
        PlanError, match=r"Site 'fc' has reason='tired', which is not one of 'excluded', .*'factorized'\."
    ):
        Plan.from_json(changed_json(scheme=None, ranks=None, reason="tired"))


def test_an_unknown_emit_is_refused() -> None:
    with pytest.raises(PlanError, match=r"emit='onnx', which is not one of 'graph' or 'modules'"):
        Plan.from_json('{"format": 1, "sites": [], "emit": "onnx"}')


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (["2"], "[0]='2', which is not a whole number"),
        ([2.0], "[0]=2.0, which is not a whole number"),
        ([1, True], "[1]=True, which is not a whole number"),
        ("2", "='2', which is not a list"),
        (2, "=2, which is not a list"),
        ([[2]], "[0]=[2], which is not a whole number"),
        ([2**63], f"[0]={2**63}, which is not a whole number of 64 bits"),
    ],
)
@pytest.mark.parametrize("key", ["ranks", "shape", "full_ranks"])
def test_ranks_and_shapes_that_are_not_whole_numbers_are_refused(key: str, value: object, text: str) -> None:
    with pytest.raises(PlanError, match=re.escape(f"Site 'fc' has {key}{text}. Pass the text that Plan.to_json gave")):
        Plan.from_json(changed_json(**{key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 5),
        ("kind", None),
        ("shape", None),
        ("calls", "one"),
        ("note", 5),
        ("parameters_before", "64"),
        ("parameters_after", None),
        ("flops_before", [1]),
        ("gain", "2x"),
        ("error", "small"),
    ],
)
def test_a_field_of_the_wrong_type_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(PlanError, match=key):
        Plan.from_json(changed_json(**{key: value}))


@pytest.mark.parametrize(
    "changes",
    [
        {"reason": Reason.TIED},
        {"ranks": None},
        {"scheme": None},
        {"scheme": None, "ranks": None},
        {"scheme": None, "reason": Reason.TIED},
    ],
)
def test_a_site_is_either_factorized_or_kept(changes: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="either factorized, with a scheme and ranks, or kept, with a reason"):
        site(**changes)
    with pytest.raises(PlanError, match="either factorized"):
        Plan.from_json(changed_json(**changes))


@settings(deadline=None)
@given(value=JSON)
def test_arbitrary_json_raises_only_plan_errors(value: object) -> None:
    for data in (value, {"format": 1, "sites": value}, {"format": 1, "sites": [value]}):
        try:
            plan = Plan.from_json(json.dumps(data))
        except PlanError:
            continue
        assert plan == Plan(sites=())


@settings(deadline=None)
@given(key=st.sampled_from(SITE_FIELDS + PLAN_FIELDS), value=JSON)
def test_a_plan_with_one_field_of_any_value_is_refused_or_can_be_used(key: str, value: object) -> None:
    data = json.loads(Plan(sites=(site(),)).to_json())
    (data["sites"][0] if key in SITE_FIELDS else data)[key] = value
    try:
        plan = Plan.from_json(json.dumps(data))
    except PlanError:
        return
    assert "sites factorized" in str(plan)
    assert isinstance(plan.parameters_before, int)
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()


def test_sites_are_found_by_name_and_in_order() -> None:
    plan = make_plan()
    names = ["conv1", "conv2", "fc", "spare"]
    assert [site.name for site in plan] == names
    assert len(plan) == 4
    assert plan["conv2"] is plan.sites[1]
    with pytest.raises(KeyError, match=r"no site 'conv3' in this plan. Nearest: 'conv2', 'conv1'"):
        plan["conv3"]


def test_each_site_is_either_in_factorized_or_in_kept() -> None:
    plan = make_plan()
    assert [site.name for site in plan.factorized] == ["conv2", "fc"]
    assert {site.name: site.reason for site in plan.kept} == {"conv1": Reason.EXCLUDED, "spare": Reason.NOT_CALLED}


def test_totals_are_those_of_the_models() -> None:
    model = Net()
    plan = tdfx.plan(model, POLICY, example_inputs=torch.zeros(2, 3, 8, 8))
    small = tdfx.rewrite(model, plan)
    assert plan.parameters_before == sum(parameter.numel() for parameter in model.parameters())
    assert plan.parameters_after == sum(parameter.numel() for parameter in small.parameters())
    assert plan.parameters_after < plan.parameters_before
    # Two operations for each of 2·8·8 positions (2 for fc) and each value of a weight that is used.
    assert plan.flops_before == 2 * 128 * (16 * 27 + 32 * 144) + 2 * 2 * 320


def test_flops_are_unknown_without_inputs() -> None:
    plan = make_plan(inputs=False)
    assert plan.flops_before is None
    assert plan.flops_after is None
    assert "FLOPs of the sites" not in str(plan)
    assert "FLOPs of the sites" in str(make_plan())


def test_the_text_has_every_site_the_totals_and_the_notes() -> None:
    text = str(Plan(sites=(*make_plan().sites, site(name="")), notes=("first", "second"), model="Net"))
    lines = text.splitlines()
    for name in ("conv1", "conv2", "fc", "spare", "(root)"):
        assert sum(line.startswith(f"{name} ") for line in lines) == 1, name
    assert re.search(r"^conv2 +Conv2d 32×16×3×3 +tucker2 +16/8 ", text, re.MULTILINE)
    assert re.search(r"^conv1 +Conv2d 16×3×3×3 +excluded ", text, re.MULTILINE)
    assert "Net: 3 of 5 sites factorized; kept: 1 excluded, 1 not_called" in lines
    assert re.search(r"^parameters \S+ → \S+ \(\d+%\)$", text, re.MULTILINE)
    assert lines[-2:] == ["note: first", "note: second"]


@pytest.mark.parametrize("name", ["[b]", "[/b]", ":smile:"])
def test_markup_in_a_name_is_shown_as_text(name: str) -> None:
    # Keys of an nn.ModuleDict may hold brackets, which rich reads as markup in a string.
    assert str(Plan(sites=(site(name=name),))).splitlines()[1].startswith(f"{name} ")


def test_a_model_without_values_is_planned_like_one_with_values_except_for_the_errors() -> None:
    with torch.device("meta"):
        model = Net()
    empty = torch.zeros(2, 3, 8, 8, device="meta")
    for rank in (
        tdfx.Ratio(of=0.5),
        tdfx.Fixed({"conv*": 8, "fc": 4}),
        tdfx.Ratio(of=0.5).at_least(8),
    ):
        policy = tdfx.Policy(rank=rank, min_gain=0, cost=tdfx.Modelled())
        on_meta, on_cpu = (
            tdfx.plan(net, policy, example_inputs=x) for net, x in ((model, empty), (Net(), torch.zeros(2, 3, 8, 8)))
        )
        assert on_cpu.total_error > 0
        assert on_meta == replace(on_cpu, sites=tuple(replace(site, error=None) for site in on_cpu))
    lower = tdfx.rewrite(model, on_meta, init="empty")
    lower_plan = tdfx.plan(lower, tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, round_to=1), example_inputs=empty)
    assert lower_plan["conv2"].ranks == (8, 4)
    assert lower_plan["conv2"].error is None


def test_weights_without_values_are_not_read_and_not_split() -> None:
    with torch.device("meta"):
        model = Net()
    ratio = tdfx.Ratio(of=0.5)
    for rank in (tdfx.VBMF(), tdfx.Energy(), tdfx.Budget(parameters=0.6), ratio | tdfx.VBMF()):
        with pytest.raises(
            tdfx.WeightError, match=r"is on the meta device and has no values, and .* reads them\. Load"
        ):
            tdfx.plan(model, tdfx.Policy(rank=rank, min_gain=0))
    part = tdfx.Policy(rank=ratio, min_gain=0, overrides={"fc": tdfx.Policy(rank=tdfx.VBMF())})
    with pytest.raises(
        tdfx.WeightError, match="The weight of site 'fc' is on the meta device and has no values, and VBMF"
    ):
        tdfx.plan(model, part)
    with pytest.raises(tdfx.WeightError, match=r"so it cannot be split\. Load the model .*, or pass init='empty'"):
        tdfx.rewrite(model, tdfx.Policy(rank=ratio, min_gain=0))
