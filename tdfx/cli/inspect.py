"""``tdfx inspect``."""

from __future__ import annotations

from pathlib import Path

import click

import tdfx
from tdfx.cli.inputs import parse_input
from tdfx.cli.output import check_writable, show, write
from tdfx.cli.weights import load_weights
from tdfx.plan_table import plan_view
from tdfx.ranks.registry import parse_rule
from tdfx.references import build_model

_RULES = (
    "vbmf[:floor], energy[:share], stable, threshold:above, ratio[:of], params:share, flops:share or speedup:times, and "
    "after it any of "
    ",at_least=N ,at_most=N ,round_to=N."
)


@click.command()
@click.argument("model")
@click.option(
    "--input", "inputs", multiple=True, metavar="SHAPE", help="Shape of an input, such as 8,3,224,224 or int64:2,16."
)
@click.option("--policy", "rule", default="vbmf", show_default=True, metavar="RULE", help=_RULES)
@click.option("--include", multiple=True, metavar="GLOB", help="Rewrite only these sites.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Keep these sites.")
@click.option(
    "--modelled", is_flag=True, help="Estimate times by arithmetic, in place of measuring them on this machine."
)
@click.option(
    "--min-gain", type=float, default=tdfx.Policy().min_gain, show_default=True, help="Least speed-up of a site."
)
@click.option(
    "--weights", type=click.Path(dir_okay=False, path_type=Path), help="A state_dict to load; no code in it is run."
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the plan to a file.")
def inspect(
    model: str,
    inputs: tuple[str, ...],
    rule: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    modelled: bool,
    min_gain: float,
    weights: Path | None,
    json_file: Path | None,
) -> None:
    """Show which layers of MODEL would be rewritten, and why not where not.

    MODEL is torchvision:NAME, package.module:factory or path/to/file.py:factory. Without --weights the model is untrained,
    and a rule that reads its weights (vbmf, energy, stable, threshold) finds no signal in them; ratio:0.25 shows what a
    quarter of the ranks would bring. With --input, layers are timed on this machine; what was timed once is kept.
    """
    check_writable(json_file)
    cost = tdfx.Modelled() if modelled else tdfx.Measured()
    policy = tdfx.Policy(
        rank=parse_rule(rule), include=include or ("*",), exclude=exclude, min_gain=min_gain, cost=cost
    )
    examples = tuple(parse_input(one) for one in inputs) or None
    built = build_model(model)
    if weights is not None:
        load_weights(built, weights)
    plan = tdfx.plan(built, policy, example_inputs=examples)
    show(plan_view(plan))
    write(json_file, plan.to_json())
