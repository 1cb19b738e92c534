"""``tdfx inspect``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

import tdfx
from tdfx.cli.completers import complete_filter, complete_model, complete_policy
from tdfx.cli.output import STDOUT, check_writable, say, show, write
from tdfx.errors import ModelReferenceError, TdfxError

_RULES = (
    "default[:times], speedup:times, vbmf[:floor], energy[:share], stable, threshold:above, ratio[:of], params:share (of "
    "the model's parameters) or flops:share (of the sites' operations), optionally followed by ,at_least=N ,at_most=N "
    ",round_to=N; several rules with | between them; or a .toml or .json file with the settings of tdfx.Policy.  "
    "[default: default]"
)
_UNTRAINED = (
    "Hint: these are the model's initial weights. Load trained weights with --weights, or use a rule that does not read "
    "them: --policy ratio:0.25 keeps a quarter of the ranks."
)
SORTS = ("order", "name", "time", "saved", "gain", "error", "parameters", "flops")
"""What ``--sort`` takes."""
_PATH = click.Path(dir_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path, allow_dash=True)


@click.command(short_help="Show which layers would be rewritten, and why others would not.")
@click.argument("model", shell_complete=complete_model)
@click.option(
    "--input", "inputs", multiple=True, metavar="SHAPE", help="Shape of an input, such as 8,3,224,224 or int64:2,16."
)
@click.option(
    "--policy", "rule_or_file", default="default", metavar="RULE|FILE", help=_RULES, shell_complete=complete_policy
)
@click.option("--include", multiple=True, metavar="GLOB", help="Rewrite only these sites.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Keep these sites.")
@click.option("--min-gain", type=float, help="Least speedup of a site that is rewritten.  [default: the policy's]")
@click.option(
    "--modelled", is_flag=True, help="Estimate times from operation counts instead of measuring them on this machine."
)
@click.option(
    "--device",
    default="cpu",
    metavar="DEVICE",
    show_default=True,
    help="Where to build the model: cpu, cuda, or, for huge models, meta, which stores no weights.",
)
@click.option(
    "--weights",
    type=_PATH,
    help="A file of weights, written by torch.save or as .safetensors; no code in it is run.",
)
@click.option(
    "--sort",
    type=click.Choice(SORTS),
    default="order",
    show_default=True,
    help="Show sites in the model's order, by name, or by a quantity, the largest first. What a rewrite saves is time, or "
    "operations or parameters if times are not known.",
)
@click.option(
    "--filter",
    "filters",
    multiple=True,
    metavar="WHAT",
    help="Show only some sites: factorized, kept, a reason such as no_gain, or a glob over names. Several filters must "
    "all match.",
    shell_complete=complete_filter,
)
@click.option("--json", "json_file", type=_FILE, help="Write the plan to a file; - prints it instead of the table.")
@click.option(
    "--csv",
    "csv_file",
    type=_FILE,
    help="Write the sites that are shown to a file; - prints them instead of the table.",
)
@click.option(
    "--plot",
    "plot_file",
    type=_PATH,
    help="Draw the singular values of every site with the chosen ranks, and time and parameters before and after, into a "
    ".png, .svg or .pdf file.",
)
@click.option(
    "--html",
    "html_file",
    type=_PATH,
    help="Write a self-contained page with a sortable table, the spectrum of each site, and the network's graph.",
)
def inspect(
    model: str,
    inputs: tuple[str, ...],
    rule_or_file: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    min_gain: float | None,
    modelled: bool,
    device: str,
    weights: Path | None,
    sort: str,
    filters: tuple[str, ...],
    json_file: Path | None,
    csv_file: Path | None,
    plot_file: Path | None,
    html_file: Path | None,
) -> None:
    """Show which layers of MODEL would be rewritten, and why others would not.

    MODEL is torchvision:NAME, package.module:factory or path/to/file.py:factory. Without --weights the model is untrained,
    so errors, and ranks by vbmf, energy, stable or threshold, tell nothing about the trained model; ratio:0.25 shows what a
    quarter of the ranks would save. With --input, the training step and its layers are timed on this machine; times are
    stored and reused.

    The table fits the terminal; in a pipe it is complete.
    """
    from tdfx.cli.device import build_on, parse_device
    from tdfx.cli.inputs import parse_input
    from tdfx.cli.references import find_model
    from tdfx.cli.rows import select, to_csv
    from tdfx.cli.weights import load_weights
    from tdfx.plans.table import plan_view
    from tdfx.progress import waiting
    from tdfx.report.model_view import look
    from tdfx.report.picture import check_plot, write_plot
    from tdfx.report.webpage import write_page

    for file in (json_file, csv_file, plot_file, html_file):
        check_writable(file)
    if plot_file is not None:
        check_plot(plot_file)
    if json_file == csv_file == STDOUT:
        raise TdfxError("--json - and --csv - both write to the standard output. Name a file for one of them.")
    target = parse_device(device)
    build = find_model(model)  # first, because its file may register schemes, kinds and rules that the policy names
    policy = _policy(rule_or_file, include, exclude, min_gain, modelled or target.type == "meta")
    examples = tuple(parse_input(shape, target) for shape in inputs) or None
    if weights is not None and target.type == "meta":
        raise ModelReferenceError(
            "--weights has no use on --device meta, which stores no values. Leave out one of the two."
        )
    with waiting(f"building {model}"):
        built = build_on(target, model, lambda _: build())
        if weights is not None:
            load_weights(built, weights)
    plan = tdfx.plan(built, policy, example_inputs=examples)
    sites = select(plan, filters, sort)
    if STDOUT not in {json_file, csv_file}:
        show(lambda width: plan_view(plan, width, sites))
    write(json_file, plan.to_json())
    write(csv_file, to_csv(sites))
    if plot_file is not None or html_file is not None:
        model_view = look(built, plan, example_inputs=examples)
        with waiting("drawing"):
            if plot_file is not None:
                write_plot(model_view, plot_file)
            if html_file is not None:
                write_page(model_view, html_file)
    if weights is None and policy.rank.reads_values:
        say(_UNTRAINED)


def _policy(
    rule_or_file: str, include: tuple[str, ...], exclude: tuple[str, ...], min_gain: float | None, modelled: bool
) -> tdfx.Policy:
    """Return the policy of a rule or a file; the other options override its settings."""
    from tdfx.policies.policy import map_costs
    from tdfx.ranks.registry import parse_rule

    is_file = Path(rule_or_file).suffix.lower() in {".toml", ".json"}
    policy = tdfx.read_policy(rule_or_file) if is_file else tdfx.Policy(rank=parse_rule(rule_or_file))
    settings: dict[str, Any] = {"include": include or None, "exclude": exclude or None, "min_gain": min_gain}
    policy = replace(policy, **{name: value for name, value in settings.items() if value is not None})
    if modelled:
        policy = map_costs(policy, lambda cost: cost if isinstance(cost, tdfx.Modelled) else tdfx.Modelled())
    return policy
