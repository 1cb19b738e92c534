"""What the programs of forward_programs.py begin with: what users keep, and helpers that look at what they get."""

from __future__ import annotations

PRELUDE = """
import contextlib, functools, itertools, random
from collections import OrderedDict, UserDict, deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOG, STATE, ACT, ACTS = [], {"calls": 0}, nn.GELU(), {"silu": nn.SiLU()}
NUMBERS, LAST, GENERATOR = itertools.count(), None, np.random.default_rng(3)


class Point(NamedTuple):
    first: Any
    second: Any


@dataclass
class Result:
    logits: Any
    loss: Any = None


class Output(OrderedDict):
    def __init__(self, **named):
        super().__init__(**named)
        for name, value in named.items():
            setattr(self, name, value)


class Recorder:
    def __init__(self):
        self.seen, self.calls = {}, 0

    def save(self, name, value):
        self.seen[name] = value
        self.calls += 1

    def __call__(self, value):
        self.calls += 1
        return value


class Centre(nn.Module):
    def forward(self, h):
        return h - h.mean(-1, keepdim=True)


class Dims:
    __slots__ = ("rows",)
    total = 0


@functools.cache
def remembered(number):
    return number + 1.0


def numbers():
    number = 0
    while True:
        number += 1
        yield number


def keep_last(value):
    global LAST
    LAST = value


def pick(value, other):
    return value if other is None else value + other


def first_of(value):
    return value[0] if isinstance(value, (tuple, list)) else value


def rows_of(value):
    try:
        return int(value.shape[0])
    except TypeError:
        return 1


def scaled(value, by):
    value *= by
    return value


class Base(nn.Module):
    last = None
    history = []
    total = 0

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.key = nn.Linear(6, 6).requires_grad_(False)
        self.norm, self.drop, self.act = nn.BatchNorm1d(6), nn.Dropout(0.5), nn.ReLU()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.weight = nn.Parameter(torch.randn(6, 6) / 2)
        self.register_buffer("running", torch.ones(6))
        self.kept, self.slots, self.window = {}, [None, None], deque(maxlen=2)
        self.nested, self.context, self.recorder = {"in": [0, {}]}, SimpleNamespace(value=None, calls=0), Recorder()
        self.counts, self.count, self.tune, self.rate, self.names = np.zeros(2), 0, True, 0.5, {"x"}
        self.dims, self.mapping, self.calls = Dims(), UserDict(), 0
        self.rng, self.dice, self.old_rng = np.random.default_rng(0), random.Random(0), np.random.RandomState(0)
        self.torch_rng = torch.Generator().manual_seed(0)
        self.numbers, self.turns, self.rows = itertools.count(), itertools.cycle([1.0, 2.0, 3.0]), iter([2.0] * 99)
        self.yielded, self.chained = numbers(), itertools.chain([1.0, 2.0], itertools.repeat(3.0))
        self.zipped, self.tensor = zip(itertools.count(), itertools.count(5)), torch.ones(6, dtype=torch.float64)
"""
"""What every program begins with."""
