"""The parts of a run's settings; pydantic checks types, ranges and names."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

import tdfx
from tdfx.ranks.registry import parse_rule

Strings = Annotated[tuple[str, ...], Strict(False)]
Floats = Annotated[tuple[float, ...], Strict(False)]
"""Several values; TOML gives them as a list."""


class SettingsTable(BaseModel):
    """A table of settings whose values have exactly the declared types, and which has no other settings."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class ModelSettings(SettingsTable):
    """The network."""

    name: str
    """A name of ``recipe.models.BUILDERS`` or of torchvision."""
    width: int = Field(default=0, ge=0)
    """Channels of the first layer, for networks that exist in several widths; 0 for the usual width."""
    layers: int = Field(default=0, ge=0)
    """Blocks of the transformer; 0 for 2."""


class DataSettings(SettingsTable):
    """The data set."""

    name: Literal["digits", "glyphs", "text", "cifar10", "imagefolder"]
    batch: int = Field(default=64, ge=1)
    """Samples of one step, over all processes."""
    augment: bool = True
    """Whether training images are changed at random."""
    root: str = ""
    """Folder of the data; "" for the user's cache folder. ``imagefolder`` needs one that contains ``train`` and ``val``."""
    download: bool = True
    """Whether ``cifar10`` may be downloaded if it is missing."""
    side: int = Field(default=0, ge=0)
    """Side of the images of ``imagefolder`` in pixels; 0 for 224."""
    workers: int = Field(default=0, ge=0)
    """Processes that read ``imagefolder``; 0 to read in the training process."""
    steps: int = Field(default=100, ge=1)
    """Steps in an epoch of ``text``, which is read at random positions."""
    length: int = Field(default=64, ge=2)
    """Bytes of one piece of ``text``."""
    fonts: Strings = ()
    """Folders to search for fonts, for ``glyphs``; none for the folders of the system."""


class TrainingSettings(SettingsTable):
    """The optimizer, its schedule, and how steps are computed."""

    epochs: int = Field(ge=1)
    steps: int = Field(default=0, ge=0)
    """Steps after which the training ends, within an epoch too, in place of ``epochs``; 0 for all steps of the epochs."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """``"sgd"`` with Nesterov momentum, or ``"adamw"``."""
    lr: float = Field(default=0.05, gt=0)
    """Largest learning rate."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    schedule: Literal["cosine", "step"] = "cosine"
    """``"cosine"`` lowers the rate to zero; ``"step"`` multiplies it by ``gamma`` at each of ``milestones``."""
    warmup: float = Field(default=0.0, ge=0)
    """Epochs in which the rate rises to its largest value, less than ``epochs`` if these end the training."""
    milestones: Floats = ()
    """Shares of the training, in (0, 1) and ascending, after which ``step`` lowers the rate."""
    gamma: float = Field(default=0.1, gt=0, lt=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each label that is spread over all classes."""
    clip: float = Field(default=0.0, ge=0)
    """Largest norm of all gradients together; 0 for no limit."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of an exponential average of the weights, which is then the model that is scored; 0 for none."""
    amp: Literal["none", "bf16", "fp16"] = "none"
    """What autocast computes in; ``"fp16"`` also scales the loss."""
    channels_last: bool = False
    compile: bool = False

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        if not self.steps and self.warmup >= self.epochs:
            raise ValueError(f"training.warmup={self.warmup} is not in [0, {self.epochs}), the epochs.")
        milestones = list(self.milestones)
        if milestones != sorted(set(milestones)) or not all(0 < share < 1 for share in milestones):
            raise ValueError(f"training.milestones={milestones} are not shares of the training in (0, 1), ascending.")
        if (self.schedule == "step") != bool(milestones):
            raise ValueError(
                f"training.schedule={self.schedule!r} and training.milestones={milestones} do not go together: "
                f"'step' needs milestones, such as [0.5, 0.75], and 'cosine' takes none."
            )
        return self


class SwitchingSettings(SettingsTable):
    """When the model is rewritten, and how."""

    policy: str = "default"
    """``"none"`` for no rewrite, ``"default"`` for ``tdfx.Policy()``, or a rule as for ``tdfx inspect``."""
    metric: Literal["auto", "loss", "inputs", "weights"] = "auto"
    """As in ``tdfx.Policy``."""
    when: Literal["auto", "epoch", "settled"] = "epoch"
    """``"auto"`` leaves the moment to ``tdfx.Switch``, and ``"settled"`` switches when the ranks have settled."""
    epoch: int = Field(default=1, ge=0)
    """Epochs before the switch, at least 1; with ``"settled"``, epochs after which no layer waits longer, 0 for no limit."""
    every: int = Field(default=100, ge=1)
    """Steps between two looks at the ranks."""
    min_gain: float = tdfx.Policy().min_gain
    round_to: int | Literal["auto"] = tdfx.Policy().round_to
    exclude: Strings = ()
    """These three as in ``tdfx.Policy``."""
    cost: Literal["measured", "modelled"] = "measured"
    """``"measured"`` on this machine, or ``"modelled"``, which is the same on every machine."""
    measure: float = Field(default=15.0, gt=0)
    """Most wall-clock seconds to measure layers; on a loaded machine few layers are measured in that time."""
    weigh: bool = True
    """Whether the switch leaves out sites that cost more than they save in the rest of the run, and measures less."""
    rewarm: int = Field(default=0, ge=0)
    """Steps in which the learning rate warms up again after a switch."""

    @model_validator(mode="after")
    def _check_policy(self) -> Self:
        if self.when == "epoch" and self.epoch < 1:
            raise ValueError(f"switch.epoch={self.epoch} is below 1, the first epoch after which a run can switch.")
        if self.when == "auto" and not self.weigh:
            raise ValueError(
                "switch.when='auto' and switch.weigh=False do not go together: the moment is chosen by the steps of the "
                "whole training. Leave switch.weigh out, or set switch.when='epoch'."
            )
        try:
            self.policy_with(tdfx.Modelled())
        except tdfx.PolicyError as error:
            raise ValueError(f"[switch] has settings that no policy can have: {error}") from error
        return self

    def policy_with(self, cost: tdfx.Modelled | tdfx.Measured) -> tdfx.Policy:
        """Return the policy of the settings with a cost model."""
        given: dict[str, Any] = {} if self.policy in {"none", "default"} else {"rank": parse_rule(self.policy)}
        if self.metric != "auto":
            given["metric"] = self.metric
        return tdfx.Policy(min_gain=self.min_gain, round_to=self.round_to, exclude=self.exclude, cost=cost, **given)


class OutputSettings(SettingsTable):
    """What a run writes and checks."""

    checkpoint: str = ""
    """File to which the run is saved after each epoch, and from which ``--resume`` continues; "" for none."""
    every: int = Field(default=0, ge=0)
    """Steps after which it is also saved within an epoch; 0 for never."""
    tensorboard: str = ""
    """Folder for TensorBoard; "" for none."""
    evaluate: int = Field(default=1, ge=0)
    """Epochs between two scorings on held-out data; 0 for none. The merged model is scored in any case."""
    verify: bool = True
    """Whether ONNX exports are compared at the end; the outputs before and after the merge are compared in any case."""
