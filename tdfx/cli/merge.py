"""``tdfx merge``."""

from __future__ import annotations

from pathlib import Path

import click

import tdfx
from tdfx.errors import PlanError
from tdfx.text import short_number

_PATH = click.Path(path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(short_help="Make a checkpoint of a factorized model dense.")
@click.argument("checkpoint", type=_PATH)
@click.option(
    "-o",
    "--output",
    type=_PATH,
    required=True,
    help="A .safetensors or .pt file for the state_dict; a .ckpt file, if Lightning wrote the checkpoint; or a new "
    "folder, if Hugging Face did.",
)
@click.option(
    "--plan",
    "plan_file",
    type=_FILE,
    help="The plan by which the model was rewritten, as Plan.to_json wrote it; needed only if none lies beside the weights.",
)
@click.option(
    "--trusted", is_flag=True, help="Run code in the checkpoint, if it holds any; only for files of your own."
)
def merge(checkpoint: Path, output: Path, plan_file: Path | None, trusted: bool) -> None:
    """Multiply the factors in CHECKPOINT out, and write the weights of the dense model.

    CHECKPOINT is a file of tdfx.save, of torch.save, .safetensors, a .ckpt file of Lightning, a folder of Hugging Face, or
    one of torch.distributed.checkpoint. No model is built. A dense checkpoint is written as it is.
    """
    from torch import Tensor

    from tdfx.checkpoint.dense_files import check_target, write_dense
    from tdfx.checkpoint.merging import read_dense
    from tdfx.progress import waiting

    check_target(output, checkpoint)
    plan = None if plan_file is None else read_plan(plan_file)
    with waiting(f"reading {checkpoint}"):
        dense = read_dense(checkpoint, plan=plan, trusted=trusted)
    with waiting(f"writing {output}"):
        write_dense(dense.tensors, output, dense.contents, checkpoint)
    count = len(dense.joined)
    done = f"{count} layer{'s' * (count != 1)} merged" if count else "no factors in it, so nothing to merge"
    values = sum(value.numel() for value in dense.tensors.values() if isinstance(value, Tensor))
    click.echo(f"{checkpoint}: {done}; {output}: {len(dense.tensors)} tensors, {short_number(values)} values")


def read_plan(path: Path) -> tdfx.Plan:
    """Read the plan in a file; raise PlanError if there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(
            f"The plan {str(path)!r} could not be read: {error}. Name a file that tdfx inspect --json or Plan.to_json wrote."
        ) from error
    return tdfx.Plan.from_json(text)
