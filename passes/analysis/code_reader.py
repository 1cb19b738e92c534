"""Reads every function that a trace is about to run, before it runs."""

from __future__ import annotations

import gc
import sys
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from tdfx.passes.analysis.safe_calls import MUTATING_METHODS, refusal_of_callable, torch_codes
from tdfx.passes.analysis.safe_code import SafeCode, UnsafeConstructError
from tdfx.passes.analysis.source import STANDARD_LIBRARY, TORCH, definition_of, is_users_file, line_of

_COMPREHENSIONS = {"<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>"}
_CALLED_FROM_FORWARD = tuple(
    f"{TORCH}{name}"
    for name in (
        "fx/",
        "_tensor.py",
        "_jit_internal.py",
        "overrides.py",
        "nn/modules/module.py",
        "nn/modules/container.py",
    )
)
_LISTING_PARAMETERS = {"parameters", "named_parameters", "buffers", "named_buffers", "state_dict", "_named_members"}


class UnsafeCodeError(RuntimeError):
    """A trace was about to run code that a graph would not repeat."""


class CodeReader:
    """Watches a trace, and stops it before anything runs that is not known to be safe."""

    def __init__(self, running: Callable[[], str]) -> None:
        self.running = running
        """Returns the path of the module whose forward is running."""
        self.attributes: defaultdict[str, set[str]] = defaultdict(set)
        """Path of a module -> the names of the attributes that its code reads, and of what it reads of its file."""
        self.files: defaultdict[str, set[str]] = defaultdict(set)
        """Name of a file's module -> the names that its code reads."""
        self.refusal = ""
        """Why the trace was stopped; "" if it was not."""
        self._fresh_lines: dict[types.CodeType, set[int]] = {}
        """Each function that was read -> the lines in which it changes containers of its own."""
        self._parts: set[types.CodeType] = set()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Read what runs meanwhile in this thread.

        The garbage collector waits: its callbacks and finalizers would run in between, and are no code of the trace.
        """
        before, collects = sys.getprofile(), gc.isenabled()
        gc.disable()
        sys.setprofile(self._on_event)
        try:
            yield
        finally:
            sys.setprofile(before)
            if collects:
                gc.enable()

    def _on_event(self, frame: types.FrameType, event: str, argument: object) -> None:
        if event == "call":
            if frame.f_code.co_name != "__del__":  # nobody calls a finalizer
                self._on_call(frame)
        elif event == "c_call" and frame.f_code in self._fresh_lines:
            self._on_builtin(frame, argument)

    def _on_call(self, frame: types.FrameType) -> None:
        code, caller = frame.f_code, frame.f_back
        module = str(frame.f_globals.get("__name__", ""))
        if code.co_filename == "<string>" and (module.startswith("namedtuple_") or module.split(".")[0] == "torch"):
            return
        if is_users_file(code.co_filename):
            self._read(frame)
        elif caller is not None and caller.f_code in self._fresh_lines:
            if code.co_filename.startswith(TORCH):
                self._on_call_of_torch(code, caller)
            elif not code.co_filename.startswith("<") and module.split(".")[0] != "tdfx":
                self._read(frame)
        elif (
            code.co_name == "__enter__" and code.co_filename.startswith(TORCH) and "/torch/fx/" not in code.co_filename
        ):
            self._refuse(f"enters {type(frame.f_locals.get('self')).__name__}")

    def _on_call_of_torch(self, code: types.CodeType, caller: types.FrameType) -> None:
        is_known = code in torch_codes() or code.co_filename.startswith(_CALLED_FROM_FORWARD)
        if not is_known or code.co_name in _LISTING_PARAMETERS:
            self._refuse(f"calls {code.co_name}(), which leaves no trace in a graph", caller)

    def _on_builtin(self, frame: types.FrameType, function: object) -> None:
        is_change = getattr(function, "__name__", "") in MUTATING_METHODS
        if is_change and frame.f_lineno in self._fresh_lines.get(frame.f_code, ()):
            return
        if refusal := refusal_of_callable(function):
            self._refuse(refusal, frame)

    def _read(self, frame: types.FrameType) -> None:
        code = frame.f_code
        if code in self._parts:
            return  # it is a comprehension in a function that was read
        definition = definition_of(code)
        if definition is None:
            self._refuse(f"runs {code.co_name}(), whose source cannot be had")
            return
        reading = SafeCode(definition, frame.f_locals, frame.f_globals)
        try:
            reading.check()
        except UnsafeConstructError as unsafe:
            self._refuse(f"{unsafe} ({line_of(code, unsafe.line)})")
        self._fresh_lines[code] = reading.fresh_lines
        for part in _comprehensions(code):
            self._parts.add(part)
            self._fresh_lines[part] = reading.fresh_lines
        self.attributes[self.running()] |= reading.attributes
        self.files[str(frame.f_globals.get("__name__", ""))] |= reading.attributes & frame.f_globals.keys()

    def _refuse(self, what: str, frame: types.FrameType | None = None) -> None:
        where = f" ({line_of(frame.f_code, frame.f_lineno)})" if frame is not None else ""
        self.refusal = f"its forward {what}{where}"
        raise UnsafeCodeError(self.refusal)


def refuse_wrapped_forward(module: nn.Module) -> None:
    """Raise UnsafeCodeError if Python's library runs code around a module's forward, as contextlib does."""
    code = getattr(getattr(module.forward, "__func__", module.forward), "__code__", None)
    if code is None or (code.co_filename.startswith(STANDARD_LIBRARY) and not is_users_file(code.co_filename)):
        raise UnsafeCodeError(
            f"the forward of {type(module).__name__} is wrapped, and what runs around it is not known"
        )


def _comprehensions(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield the code of the comprehensions in a function, which have code of their own."""
    for part in code.co_consts:
        if isinstance(part, types.CodeType) and part.co_name in _COMPREHENSIONS:
            yield part
            yield from _comprehensions(part)
