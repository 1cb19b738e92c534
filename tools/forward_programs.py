"""Writes small models at random, out of what the forwards of users do beside computing."""

from __future__ import annotations

import linecache
import random
import textwrap
from typing import Any

from forward_prelude import PRELUDE

STATEMENTS = {
    "layers": """
        {x} = self.a({y}) | {x} = self.b({y}).relu() | {x} = self.norm({y}) | {x} = self.drop({y}) | {x} = {x} + {y}
        {x} = self.block({y}) | {x} = first_of(self.block({y})) | {x} = F.linear({y}, self.weight)
        {x} = torch.tanh({y}) | {x} = self.layers[0]({y}) | {x} = self.act({y})
        {x} = torch.cat([{x}, {y}], 1)[:, ::2] | {x} = {y}.mT.mT * 2 | {x} = self.a(self.b({y}))
        {x} = functools.reduce(lambda v, layer: layer(v), self.layers, {y}) | {x} = getattr(self, "a")({y})
        {x} = nn.Linear.forward(self.a, {y}) | {x} = self.a.forward({y})
        {x} = [layer({y}) for layer in self.layers][-1] | {x} = (lambda v: self.b(v))({y}) | {x} = self.step({y})
        {x} = {y} @ self.weight | {x} = super().__getattr__("a")({y}) | {x} = F.dropout({y}, 0.5, self.training)
    """,
    "in place": """
        {x} += {y} | {x} *= 2 | {x}[:, 0] = 0 | {x}[0] += 1 | {x}.add_({y}) | {x}.relu_() | F.relu({x}, inplace=True)
        part = {x}[:, :3]; part += 1 | {x} = {y} | {x} = {y}.view(-1).view(-1, 6) | {x}.unbind(0)[0].mul_(2)
        {x}.data = {x}.data.clamp(-1, 1) | {x} = {y}.detach(); {x}.requires_grad = True | {x} = {x} * 1; {x}.tag = 1
        {x} = scaled({y}, 2) | {x} = {y}.detach(); {x}.requires_grad_() | {x}.register_hook(lambda g: g * 2)
        {x}.retain_grad() | {x} = {y} + 0; {x}.view(-1)[0] = 3 | {x} = {y}.T; {x} *= 2; {x} = {x}.T
        {x} = torch.zeros_like({y}); {x}[:] = {y} | setattr({x}, "tag", 2) | {x}.__iadd__({y}) | del {x}.tag
        {x} = {y}.clone(); {x}[{x} > 0] = 1 | {x}, {y} = {y}, {x} | {x} = torch.empty_like({y}).copy_({y})
        {x} = torch.Tensor.mul_({y}, 2) | torch.mul({y}, 2, out={x}) | {x} = {y} + self.tensor; self.tensor.add_(1)
    """,
    "aliases": """
        n = {x}.shape; {x}.unsqueeze_(0); {x} = {x}.squeeze(0) * n[0] | n = {x}.ndim; {x}.unsqueeze_(0); {x} = {x}[0] * n
        n = {x}._version; {x} += 1; {x} = {x} * n | v = {x}.T; {x} *= 2; {x} = {x} + v.T | v = {x}.real; v += 1
        v = {x}.data; v *= 2 | f = {x}.sum; {x} += 1; {x} = {x} * f() | d = {x}.detach(); {x} *= 2; {x} = {x} + d
        p, q = {x}.chunk(2, 1); p += 1; q *= 2 | n = {x}.stride(); {x}.t_(); {x} = {x}.t() * n[0] | v = {x}; v -= {y}
        n = {x}.shape[0]; {x} = torch.cat([{x}, {y}]); {x} = {x}[:n] | v = ({x}, {y}); {x} += 1; {x} = v[0] + v[1]
        {x} @= torch.eye(6, dtype={x}.dtype) | {x} /= 3 | {x} **= 2 | {x}.T.mul_(2) | {x}.mT[0] = 1 | {x}.T.tag = 1
        torch.add({x}, 1, out={x}) | v = {x}.expand(2, -1, -1)[0]; {x} = {x} + 1; {x} += v | v = {x}.is_leaf; {x} *= v + 1
        n = {x}.size(); {x} = {x}.reshape(-1); {x} = {x}.view(n) | v = {x}[0]; {x}.zero_(); {x} = {x} + v
        v = {x}.requires_grad; {x} = {x}.detach(); {x} = {x} * (v + 1) | v = {x}.T; v = v.T; v *= 2
        v = {x}.mT.mT; v **= 2 | w = self.a.weight.T; {x} = {y} @ w | w = self.tensor.T; w += 1; {x} = {y} + self.tensor
    """,
    "contexts": """
        torch.set_grad_enabled(False); {x} = self.a({y}); torch.set_grad_enabled(True)
        {x} = {y} * (2 if torch.is_grad_enabled() else 3) | {x} = {y} * (2 if torch.is_autocast_enabled("cpu") else 3)
        {x} = checkpoint(self.a, {y}, use_reentrant=False) | {x} = torch.no_grad()(self.a)({y})
        {x} = {y} * (2 if torch.is_inference_mode_enabled() else 3) | {x} = self.frozen({y})
        {x} = {y} * (2 if torch.get_default_dtype() == torch.float64 else 3)
    """,
    "state": """
        self.kept["y"] = {x} | self.kept.setdefault("z", {x}.detach()) | self.kept["n"] = self.kept.get("n", 0) + 1
        self.slots[0] = {x} | self.window.append({x}) | self.context.value = {x} | self.recorder.save("y", {x})
        LOG.append({x}) | STATE["calls"] += 1 | keep_last({x}) | type(self).last = {x} | self.counts[0] += 1
        self.count += 1 | self.running.mul_(0.9).add_({x}.detach().mean(0), alpha=0.1) | Base.history.append(1)
        self.running = {x}.detach().mean(0) | self.nested["in"][0] += 1 | self.nested["in"][1]["y"] = {x}
        self.names.add("y") | self.kept.update(n=1) | self.kept |= {{"m": 2}} | self.slots += [1]
        self.slots.insert(0, 4) | self.names.discard("x") | self.kept.clear() | self.kept.pop("n", None)
        self.dims.rows = len({x}) | {x} = {y} * float(self.counts.sum()) | {x} = {y} * len(LOG)
        {x} = {y} / (1 + self.count) | {x} = {y} + self.running | {x} = {y} + len(self.window) + STATE["calls"]
        {x} = {y} * (1 if self.last is None else 2) | {x} = {y} * (1 if self.context.value is None else 2)
        {x} = {y} * self.recorder.calls | {x} = {y} * (LAST is None) | {x} = self.recorder({y})
        {x} = {y} * len(self.slots) | {x} = {y} * self.kept.get("n", 1) | self.flag = True
        {x} = {y} * (2 if hasattr(self, "flag") else 3) | vars(self)["count"] = 7 | self.__dict__["rate"] = 0.25
        object.__setattr__(self, "rate", 0.125) | {x} = {y} * self.rate | setattr(self, "count", self.count + 2)
        Base.total += 1; {x} = {y} * Base.total | {x} = {y} * len(self.history) | globals()["LAST"] = {x}
        self.slots.reverse() | np.add(self.counts, 1, out=self.counts) | self.counts = self.counts + 1
        self.counts.fill(2) | {x} = {y} + sum(self.kept.values()) if not self.kept else {y}
        self.nested["in"].append(0) | pick.calls = 1 | {x} = {y} * getattr(pick, "calls", 3)
        self.register_buffer("extra", {x}.detach()) | self.eval() | self.b.train(True)
        {x} = {y} + next(self.numbers) | {x} = {y} * next(self.turns) | {x} = {y} * next(self.rows)
        {x} = {y} + next(NUMBERS) | {x} = {y} * next(self.yielded) | {x} = {y} * next(self.chained)
        {x} = {y} * next(self.zipped)[1] | Dims.total += 1; {x} = {y} * Dims.total | {x} = {y} * remembered(3)
        self.mapping["n"] = len(self.mapping) + 1; {x} = {y} * len(self.mapping) | {x} = {y} * (1 + self.block.calls)
    """,
    "generators": """
        {x} = {y} * self.rng.random() | {x} = {y} * self.dice.random() | {x} = {y} * self.old_rng.rand()
        {x} = {y} * random.random() | {x} = {y} * np.random.rand() | {x} = {y} * torch.rand(())
        {x} = {y} * torch.rand_like({y}) | {x} = {y} * torch.rand((), generator=self.torch_rng)
        {x} = {y}[torch.randperm({y}.shape[0])] | {x} = {y} * float(torch.rand(()))
        {x} = {y} + torch.randn(6, dtype=torch.float64) | {x} = {y} * GENERATOR.random()
        {x} = {y} + torch.randn({y}.shape, dtype={y}.dtype) | {x} = torch.bernoulli(torch.sigmoid({y})) * {x}
        random.shuffle(self.slots) | torch.manual_seed(5); {x} = {y} * torch.rand(())
        {x} = {y} * self.dice.choice([1, 2]) | {x} = {y}.new_empty({y}.shape).uniform_(0, 1) * {x}
        {x} = {y} * torch.empty(6, dtype={y}.dtype).normal_()
    """,
    "looks": """
        {x} = {y} * rows_of({y}) | {x} = pick({y}, None) | {x} = {y} * (2 if {y}.dtype == torch.float64 else 3)
        {x} = {y} * (2 if {y}.dim() == 2 else 3) | {x} = {y} * (2 if {y}.requires_grad else 3)
        {x} = {y} / {y}.shape[0] | {x} = {y} * (2 if {y}.grad_fn is None else 3) | assert {x}.shape[1] == 6
        {x} = {y} * len(str({y}.shape)) | {x} = {y} * float({y}.mean()) | {x} = {y} * {y}.sum().item()
        {x} = {y} * {y}.tolist()[0][0] | {x} = {y} * len({y}) | {x} = {y} * (2 if {x} is {y} else 3)
        {x} = {y} * (2 if torch.is_tensor({y}) else 3) | {x} = {y} / {y}.numel()
        {x} = {y} * (2 if isinstance({y}, torch.fx.Proxy) else 3)
        {x} = {y} * (2 if {y}.__class__ is torch.Tensor else 3)
        {x} = {y} * (2 if torch.is_floating_point({y}) else 3) | {x} = {y} * len(f"{{{y}.dtype}}")
        {x} = {y} * (2 if callable({y}) else 3) | {x} = {y} * (2 if id({x}) == id({y}) else 3)
        {x} = {y} * (2 if {y}.is_leaf else 3) | {x} = {y} * {y}.stride(0)
        {x} = {y} * (2 if {y}.is_contiguous() else 3) | {x} = {y} * (2 if "cpu" in str({y}.device) else 3)
        {x} = {y} * {y}.ndim | {x} = {y} * (2 if torch.equal({x}, {y}) else 3) | {x} = {y} * (2 if {y}.any() else 3)
        {x} = {y} * ({y}.size(0) > 3) | {x} = torch.stack([row for row in {y}])
        {x} = torch.stack([{y}[i] for i in range({y}.shape[0])]) | {x} = {y} * {y}._version
        {x} = torch.tensor({y}.tolist(), dtype={y}.dtype) | {x} = {y} + torch.from_numpy({y}.detach().numpy() * 2)
        {x} = {y} * (not {y}.is_complex()) | {x} = {y} * {{True: 2, False: 3}}[{y}.shape[0] > 3]
        {x} = {y} * max({y}.shape)
    """,
    "exports": """
        {x} = {y} * (2 if torch.jit.is_tracing() else 3) | {x} = {y} * (2 if torch.compiler.is_compiling() else 3)
        {x} = {y} * (2 if torch.onnx.is_in_onnx_export() else 3) | {x} = {y} * (2 if torch.jit.is_scripting() else 3)
        {x} = {y} * (2 if torch.compiler.is_exporting() else 3)
        {x} = {y} * (2 if torch.fx._symbolic_trace.is_fx_tracing() else 3)
    """,
    "modules": """
        {x} = nn.ReLU()({y}) | {x} = ACT({y}) | {x} = ACTS["silu"]({y}) | {x} = {y} + nn.MSELoss()({x}, {y})
        {x} = Centre()({y}) | {x} = nn.Sequential(self.a, nn.ReLU())({y}) | {x} = nn.Dropout(0.5)({y})
        {x} = nn.Dropout(0.5).train(self.training)({y})
    """,
    "parameters": """
        {x} = {y} + sum(p.square().sum() for p in self.parameters()) | {x} = {y} + self.a.weight.sum()
        {x} = {y} * self.a.bias | self.a.weight.data.clamp_(-0.3, 0.3) | {x} = {y} @ self.b.weight
        self.key.weight.data.lerp_(self.a.weight.data, 0.1)
        {x} = {y} + torch.nn.utils.parameters_to_vector(self.a.parameters()).sum()
        {x} = {y} * len(list(self.parameters())) | {x} = {y} + self.state_dict()["a.bias"]
        {x} = {y} + self.get_parameter("a.bias") | {x} = {y}.to(self.a.weight.dtype)
        {x} = {y}.to(next(self.parameters()).device) | {x} = self.key({y})
        self.key.load_state_dict(self.a.state_dict()) | {x} = {y} * sum(p.requires_grad for p in self.parameters())
        self.a.weight.requires_grad_(False)
    """,
}
"""Kind -> statements that are let into a forward, as templates; each changes or makes tensors of six columns."""

WRAPPERS = """
    if self.training: | if self.tune: | if torch.is_grad_enabled(): | if {x}.shape[0] > 3: | if {x}.mean() > 0:
    if isinstance({x}, torch.Tensor): | if type({x}) is torch.Tensor: | if hasattr({x}, "tensors"): | if {x} is None:
    if not self.training: | if {x}.dtype is torch.float64: | if self.count < 2: | if isinstance({x}, tuple):
    for _ in range(2): | with torch.no_grad(): | with torch.set_grad_enabled(self.tune):
    with torch.autocast("cpu", enabled=False): | with torch.autocast("cpu", dtype=torch.bfloat16):
    with contextlib.nullcontext(): | for layer in self.layers: | while True: | if len(LOG) < 2:
    if self.dice.random() < 0.5: | if torch.compiler.is_compiling(): | with torch.random.fork_rng(devices=[]):
    if isinstance(self.a, nn.Linear): | if self.b.training: | if random.random() < 0.5: | try:
    with torch.inference_mode(False): | if torch.rand(()) < 0.5: | for _ in self.slots: | if STATE["calls"] % 2:
    for i, _ in enumerate(self.layers): | if self.kept:
"""
"""What may stand around statements."""

CHANGES = """
    pass | pass | model.count += 3 | model.tune = not model.tune | model.rate = 0.75 | model.act = nn.Tanh()
    model.layers.append(nn.Linear(6, 6).double()) | del model.layers[-1] | model.kept["n"] = 3 | model.slots.append(5)
    model.block.count += 3 | model.block.tune = not model.block.tune | model.block.act = nn.Tanh() | STATE["calls"] += 3
    model.block.register_forward_hook(lambda m, i, o: first_of(o) * 2) | model.drop.p = 0.9 | model.dims.rows = 7
    model.a.register_forward_hook(lambda m, i, o: o * 2) | model.layers.register_forward_pre_hook(lambda m, i: None)
    Base.total += 3 | Net.last = 4 | model.flag = True | model.b.register_forward_pre_hook(lambda m, i: (i[0] * 2,))
    model.step = torch.sin | model.nested["in"][0] += 5 | model.act.register_forward_hook(lambda m, i, o: o * 2)
    model.block = nn.Identity() | model.norm = nn.Identity() | model.register_forward_hook(lambda m, i, o: None)
    model.layers[0].register_forward_hook(lambda m, i, o: o * 2) | model.names.add("w") | model.tensor.add_(1)
"""
"""What a training loop may do to a model between two calls."""

RETURNS = """
    {x} | {x}, {y} | [{x}, {y}] | {{"x": {x}, "y": {y}}} | Point({x}, {y}) | Result({x}) | Output(logits={x})
    {x}, None | {x}, 3.0 | {x}, {x}.shape[0] | OrderedDict(x={x}) | {x}, self.count | {x}, [None, ({y},)]
    {x} if self.training else ({x}, {y}) | {x}, {x} | Result(logits={x}, loss={y}.mean()) | SimpleNamespace(x={x})
    {x}, self.kept | {x}, {x}.dtype | {x}, self.training
"""
"""What a model may return."""

SIGNATURES = {
    "self, h": "plain",
    "self, h, extra": "optional",
    "self, h, extra=None": "optional",
    "self, h, *extra": "rest",
    "self, batch": "either",
    "self, h, flag=True": "plain",
}
"""Signature of the forward of a model -> the kind of arguments that it is called with."""

OPENINGS = {
    "optional": ("h = h + 1 if extra is None else h + extra", "h = pick(h, extra)", "h = h * 1"),
    "rest": ("h = h + len(extra)", "h = h + extra[0] if extra else h", "h = h * 1"),
    "either": (
        "h = batch['h'] if isinstance(batch, dict) else batch",
        "h = batch['h'] if type(batch) is dict else first_of(batch)",
        "h = first_of(batch['h'] if hasattr(batch, 'keys') else batch)",
    ),
    "plain": ("h = h * 1", "h = h"),
}
"""Kind of arguments -> how a forward may begin."""

DECORATORS = (*[""] * 30, "@torch.no_grad()", '@torch.autocast("cpu", enabled=False)', "@torch.enable_grad()")


def _choices(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for line in text.strip().splitlines() for part in line.split(" | "))


_STATEMENTS = {kind: _choices(text) for kind, text in STATEMENTS.items()}
_KINDS = [*_STATEMENTS, *["layers", "in place"] * 2]
_WRAPPERS, _RETURNS, _CHANGES = _choices(WRAPPERS), _choices(RETURNS), _choices(CHANGES)


class Program:
    """A model as text, and how it is called.

    Args:
        dice: Makes all choices.
    """

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        signature = dice.choice([*["self, h"] * 8, *SIGNATURES])
        self.arguments = SIGNATURES[signature]
        """How the model is called."""
        block = self._class("Block", "self, h", "plain", (*_RETURNS[:1] * 4, *_RETURNS[:2]))
        net = self._class("Net", signature, self.arguments, (*_RETURNS[:1] * len(_RETURNS), *_RETURNS))
        self.change = dice.choice(_CHANGES)
        """What is done to the model, by the name ``model``, before its third call."""
        self.text = f"{PRELUDE}\n\n{block}\n\n{net}"

    def _class(self, name: str, signature: str, arguments: str, returns: tuple[str, ...]) -> str:
        pick = self.dice.choice
        body = [pick(OPENINGS[arguments]), "y = self.a(h)", pick(("z = h", "z = y", "z = self.b(h)"))]
        for _ in range(pick((0, 1, 1, 2) if name == "Net" else (0, 0, 1, 1))):
            body += self._statement(pick((0, 0, 0, 0, 1, 2)))
        if name == "Net" and self.dice.random() < 0.4:
            body.append("y = first_of(self.block(y))" if self.dice.random() < 0.5 else "y = self.block(y)")
        returned = f"return {self._filled(pick(returns))}"
        block = "self.block = nn.Identity()" if name == "Block" else "self.block = Block()"
        forward = f"{pick(DECORATORS)}\ndef forward({signature}):\n" + textwrap.indent(
            "\n".join([*body, returned]), "    "
        )
        start = f"def __init__(self):\n    super().__init__()\n    {block}\n"
        step = f"{pick(DECORATORS)}\ndef step(self, h):\n    return self.layers[0](h).relu()\n"
        frozen = "@torch.no_grad()\ndef frozen(self, h):\n    return self.b(h)\n"
        return f"class {name}(Base):\n" + textwrap.indent("\n".join((start, step, frozen, forward)), "    ")

    def _statement(self, depth: int) -> list[str]:
        if depth == 0:
            return self._filled(self.dice.choice(_STATEMENTS[self.dice.choice(_KINDS)])).split("; ")
        wrapper = self._filled(self.dice.choice(_WRAPPERS))
        inner = [f"    {line}" for line in self._statement(depth - 1)]
        lines = [wrapper, *inner]
        if wrapper == "try:":
            lines += ["except (TypeError, AttributeError, RuntimeError):", "    y = y * 3"]
        elif wrapper == "while True:":
            lines.append("    break")
        elif wrapper.startswith("if") and self.dice.random() < 0.5:
            lines += ["else:", *(f"    {line}" for line in self._statement(depth - 1))]
        return lines

    def _filled(self, template: str) -> str:
        return template.format(x=self.dice.choice("hyz"), y=self.dice.choice("yzh"))

    def names(self) -> dict[str, Any]:
        """Run the program once more, and return the names of its file."""
        filename = f"program_{abs(hash(self.text))}.py"
        linecache.cache[filename] = (len(self.text), None, self.text.splitlines(keepends=True), filename)
        names: dict[str, Any] = {"__name__": __name__}  # a module that dataclasses find
        exec(compile(self.text, filename, "exec"), names)
        return names
