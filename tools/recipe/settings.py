"""The parts of a run's settings, each checked when it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recipe.errors import RecipeError
from tdfx.errors import PolicyError, nearest
from tdfx.policies.policy import Policy
from tdfx.ranks.registry import parse_rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The network."""

    name: str
    """One of ``recipe.models.OWN``, or a name of torchvision."""
    width: int = 0
    """Channels of the first layer, for the networks that come in widths; 0 for their usual one."""
    layers: int = 0
    """Blocks of the transformer; 0 for 2."""

    def __post_init__(self) -> None:
        _least("model.width", self.width, 0)
        _least("model.layers", self.layers, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What is trained on, and what is held out."""

    name: str
    """``"digits"``, ``"glyphs"``, ``"text"``, ``"cifar10"`` or ``"imagefolder"``."""
    batch: int = 64
    """Samples of one step, over all processes."""
    augment: bool = True
    """Whether images are changed at random in training."""
    root: str = ""
    """Folder of the data; "" for the user's cache folder. ``imagefolder`` needs one that holds ``train`` and ``val``."""
    download: bool = True
    """Whether ``cifar10`` may be fetched where it is missing."""
    side: int = 0
    """Side of the images of ``imagefolder`` in pixels; 0 for 224."""
    workers: int = 0
    """Processes that read ``imagefolder``; 0 for none."""
    steps: int = 100
    """Steps that count as an epoch of ``text``, which is read at random places."""
    length: int = 64
    """Bytes of one piece of ``text``."""
    fonts: tuple[str, ...] = ()
    """Folders to look for fonts in, for ``glyphs``; none for those of the system."""

    def __post_init__(self) -> None:
        _one_of("data.name", self.name, ("digits", "glyphs", "text", "cifar10", "imagefolder"))
        for name, least in (("batch", 1), ("side", 0), ("workers", 0), ("steps", 1), ("length", 2)):
            _least(f"data.{name}", getattr(self, name), least)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How it is trained."""

    epochs: int
    optimizer: str = "sgd"
    """``"sgd"`` with Nesterov's momentum, or ``"adamw"``."""
    lr: float = 0.05
    """Largest learning rate."""
    momentum: float = 0.9
    """For ``sgd``."""
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    """``"cosine"``, down to nothing, or ``"step"``, by ``gamma`` at each of ``milestones``."""
    warmup: float = 0.0
    """Epochs in which the rate rises to its largest, in [0, epochs)."""
    milestones: tuple[float, ...] = ()
    """Parts of the training, in (0, 1), rising, after which ``step`` lowers the rate."""
    gamma: float = 0.1
    """What ``step`` multiplies the rate by, in (0, 1)."""
    label_smoothing: float = 0.0
    """Part of each answer that is spread over all classes, in [0, 1)."""
    clip: float = 0.0
    """Largest norm of all gradients together; 0 for any."""
    ema: float = 0.0
    """Decay of an average of the weights, which is what is scored, in [0, 1); 0 for none."""
    amp: str = "none"
    """What autocast computes in: ``"none"``, ``"bf16"``, or ``"fp16"``, which scales the loss."""
    channels_last: bool = False
    compile: bool = False
    """Whether the model is compiled."""

    def __post_init__(self) -> None:
        _least("training.epochs", self.epochs, 1)
        _one_of("training.optimizer", self.optimizer, ("sgd", "adamw"))
        _one_of("training.schedule", self.schedule, ("cosine", "step"))
        _one_of("training.amp", self.amp, ("none", "bf16", "fp16"))
        _within("lr", self.lr, self.lr > 0, "above 0")
        _within("weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0")
        _within("clip", self.clip, self.clip >= 0, "at least 0")
        _within("warmup", self.warmup, 0 <= self.warmup < self.epochs, f"in [0, {self.epochs}), the epochs")
        _within("gamma", self.gamma, 0 < self.gamma < 1, "in (0, 1)")
        for name in ("momentum", "label_smoothing", "ema"):
            _within(name, getattr(self, name), 0 <= getattr(self, name) < 1, "in [0, 1)")
        rising = list(self.milestones) == sorted(set(self.milestones)) and all(0 < one < 1 for one in self.milestones)
        _within("milestones", list(self.milestones), rising, "parts of the training in (0, 1), rising")
        if (self.schedule == "step") != bool(self.milestones):
            raise RecipeError(
                f"training.schedule={self.schedule!r} and training.milestones={list(self.milestones)} do not go together: "
                f"'step' needs milestones, such as [0.5, 0.75], and 'cosine' takes none."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Switching:
    """When the model is rewritten, and how."""

    policy: str = "default"
    """``"none"`` for a run as it is, ``"default"`` for ``tdfx.Policy()``, or a rule as ``tdfx inspect`` takes it."""
    when: str = "epoch"
    """``"epoch"``, or ``"settled"`` for each layer when its rank has settled."""
    epoch: int = 1
    """Epochs before the switch; with ``"settled"``, after which no layer waits any longer, 0 for never."""
    every: int = 100
    """Steps between two looks at the ranks."""
    min_gain: float = 1.05
    """As in ``tdfx.Policy``; 0 rewrites every layer."""
    round_to: int = 8
    """As in ``tdfx.Policy``."""
    exclude: tuple[str, ...] = ()
    """As in ``tdfx.Policy``."""
    cost: str = "measured"
    """``"measured"`` on this machine, or ``"modelled"``, which is the same on every machine."""
    measure: float = 15.0
    """Most seconds on the wall that measuring may take, above 0; on a loaded machine little is measured in them."""
    weigh: bool = True
    """Whether the switch minds how long the run is: what it is predicted to take longer for than it saves in the rest of the
    run is left out, and measuring takes no more than is in proportion to it."""
    rewarm: int = 0
    """Steps in which the learning rate warms up again after a switch."""

    def __post_init__(self) -> None:
        _one_of("switch.when", self.when, ("epoch", "settled"))
        _one_of("switch.cost", self.cost, ("measured", "modelled"))
        _least("switch.epoch", self.epoch, 1 if self.when == "epoch" else 0)
        _least("switch.every", self.every, 1)
        _least("switch.rewarm", self.rewarm, 0)
        if not self.measure > 0:
            raise RecipeError(f"switch.measure={self.measure} is not above 0: it is the time that measuring may take.")
        try:
            Policy(min_gain=self.min_gain, round_to=self.round_to, exclude=self.exclude)
            if self.policy not in {"none", "default"}:
                parse_rule(self.policy)
        except PolicyError as error:
            raise RecipeError(f"[switch] says something that no policy can: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a run leaves behind."""

    checkpoint: str = ""
    """File to which the run is saved after each epoch, and from which ``--resume`` goes on; "" for none."""
    every: int = 0
    """Steps after which it is saved within an epoch too; 0 for never."""
    tensorboard: str = ""
    """Folder for TensorBoard; "" for none."""
    verify: bool = True
    """Whether the merged model is proved by ONNX at the end; its values are compared in any case."""

    def __post_init__(self) -> None:
        _least("output.every", self.every, 0)


def _least(name: str, value: int, least: int) -> None:
    if value < least:
        raise RecipeError(f"{name}={value} is below {least}, the least that it can be.")


def _within(name: str, value: object, right: bool, where: str) -> None:
    if not right:
        raise RecipeError(f"training.{name}={value} is not {where}.")


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise RecipeError(f"{name}={value!r} is not one of {', '.join(known)}. Nearest: {nearest(value, known, 1)}.")
