"""The demo's result as a table."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from tdfx.demo.run import DemoResult
from tdfx.plans.table import plan_view
from tdfx.text import short_number


def demo_view(result: DemoResult, width: int | None = None) -> Group:
    """Return the plan, both runs side by side, and the proof, for a number of columns or any."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    for name in ("full", "tdfx", "merged"):
        table.add_column(name, justify="right")
    table.add_row("training time", f"{result.full.seconds:.1f} s", f"{result.tdfx.seconds:.1f} s", "")
    accuracies = (result.full.accuracy, result.tdfx.accuracy, result.merged_accuracy)
    table.add_row("accuracy on held-out images", *(f"{accuracy:.2f} %" for accuracy in accuracies))
    before, after = result.parameters_before, result.parameters_after
    table.add_row("parameters", short_number(before), short_number(after), short_number(before))
    plan = Text() if result.plan is None else plan_view(result.plan, width)
    return Group(plan, Text(), table, Text(), *(Text(line) for line in _lines(result)))


def _lines(result: DemoResult) -> list[str]:
    verdict = "the same graph as the original" if result.report.ok else f"FAILED: {result.report}"
    numbers = f"{'agrees with' if result.numbers.numbers_match else 'DIFFERS from'} the factorized model"
    why = [f"decided at {event}" for event in result.kept] if result.plan is None else []
    return [
        f"tdfx trained {result.speedup:.2f}x faster in all; {result.factorized} of {result.sites} sites factorized after "
        f"step {result.switch_step} of {result.steps}",
        *why,
        f"the switch took {result.switch_seconds:.2f} s (plan and rewrite, counted above; so is the merge)",
        f"merge: outputs differ by {result.merge_error:.1e} relative to the factorized model's",
        f"ONNX: merged model: {verdict}; ONNX Runtime: it {numbers} (relative error {result.numbers.max_error:.1e})",
    ]
