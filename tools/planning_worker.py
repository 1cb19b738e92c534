"""Measure switches for ``bench_planning.py``, with the version of tdfx that is on the path.

Only public names of tdfx are used, so that this runs with other versions too. Settings come as JSON in the first argument.
The process prints the file of its tdfx. Then it runs one switch for every line on stdin, and prints a line of JSON with the
seconds that the switch took. Model and cache are prepared at the first line.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable

import torch
from nets import CharacterModel, build, with_trained_spectra
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import tdfx

_STEPS = 3
"""Training steps before the first switch."""


def _images(name: str, side: int) -> Callable[[int], tuple[nn.Module, Tensor]]:
    return lambda batch: (build(name, classes=10)[0], torch.randn(batch, 3, side, side))


def _gpt(width: int, layers: int, length: int) -> Callable[[int], tuple[nn.Module, Tensor]]:
    return lambda batch: (CharacterModel(width, layers, length=length), torch.randint(256, (batch, length)))


NETS: dict[str, Callable[[int], tuple[nn.Module, Tensor]]] = {
    "vgg19": _images("vgg19", 32),
    "resnet18": _images("resnet18", 64),
    "gpt": _gpt(256, layers=4, length=64),
    "tiny": _gpt(64, layers=1, length=16),
}
"""Name -> builder of a network and of a batch of a given size."""


class SwitchTimer:
    """Repeats the same switch on copies of one trained model."""

    def __init__(self, net: str, batch: int, total_steps: int, cpu_time: bool) -> None:
        """Train a few steps, and fill the cache of layer times by a plan and an uncounted switch."""
        torch.manual_seed(0)
        self.model, self.x = NETS[net](batch)
        with_trained_spectra(self.model).train()
        self.optimizer: Optimizer = SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.total_steps = total_steps
        self.clock = time.process_time if cpu_time else time.perf_counter
        for _ in range(_STEPS):
            self._train(self.model, self.optimizer)
        tdfx.plan(self.model, tdfx.Policy(), example_inputs=(self.x,))
        self.switch()

    def switch(self) -> dict[str, float]:
        """Switch a copy in a training loop, after a few steps; return the seconds, and the number of factorized sites."""
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        switch = tdfx.Switch(tdfx.Policy(), when=tdfx.AtStep(_STEPS), total_steps=self.total_steps, clock=self.clock)
        for _ in range(_STEPS):
            self._train(model, optimizer)
            model = switch.step(model, optimizer=optimizer, example_inputs=(self.x,))
        factorized = 0 if switch.plan is None else len(switch.plan.factorized)
        return {**{part: switch.spent[part] for part in ("planning", "rewriting")}, "factorized": factorized}

    def _train(self, model: nn.Module, optimizer: Optimizer) -> None:
        outputs = model(self.x).flatten(0, -2)
        labels = torch.arange(len(outputs)) % outputs.shape[-1]
        optimizer.zero_grad()
        nn.functional.cross_entropy(outputs, labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def main() -> None:
    """Measure a switch for every line on stdin."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings.pop("threads"))
    print(tdfx.__file__, flush=True)
    timer: SwitchTimer | None = None
    for _ in sys.stdin:
        timer = timer or SwitchTimer(**settings)
        print(json.dumps(timer.switch()), flush=True)


if __name__ == "__main__":
    main()
