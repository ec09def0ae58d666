"""Convolutional recurrent nets as people write them: what they read, and how they make their first state, differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def lstm(gates: Sequence[Tensor], c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, o, g = gates
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


class LSTMCell(nn.Module):
    """Makes its own first state, when it is told to."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden_dim, self.conv = hidden, conv(inputs + hidden, 4 * hidden)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        return lstm(torch.split(self.conv(torch.cat([x, h], dim=1)), self.hidden_dim, dim=1), c)

    def init_hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        size = x.size(0), self.hidden_dim, *x.shape[-2:]
        return torch.zeros(size, dtype=x.dtype), torch.zeros(size, dtype=x.dtype)


class ConvLSTM(nn.Module):
    """A stack of cells, each run over the whole sequence."""

    def __init__(self, inputs: int, hidden: list[int]) -> None:
        super().__init__()
        self.hidden_dim = hidden
        self.cells = nn.ModuleList(LSTMCell(a, b) for a, b in zip([inputs, *hidden], hidden, strict=False))

    def forward(self, x: Tensor) -> Tensor:
        for cell in self.cells:
            state, outputs = cell.init_hidden(x), []
            for t in range(x.size(1)):
                state = cell(x[:, t], state)
                outputs.append(state[0])
            x = torch.stack(outputs, dim=1)
        return x[:, -1]


class GRUCell(nn.Module):
    """Reset and update gates; without a state it starts with zeros."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden_size = hidden
        self.gates, self.candidate = conv(inputs + hidden, 2 * hidden), conv(inputs + hidden, hidden)

    def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
        if h is None:
            h = torch.zeros([x.size(0), self.hidden_size, *x.shape[-2:]]).to(x)
        reset, update = torch.sigmoid(self.gates(torch.cat([x, h], 1))).chunk(2, 1)
        new = torch.tanh(self.candidate(torch.cat([x, reset * h], 1)))
        return (1 - update) * h + update * new


class ConvGRU(nn.Module):
    """All cells at every time step."""

    def __init__(self, inputs: int, hidden: list[int]) -> None:
        super().__init__()
        self.cells = nn.ModuleList(GRUCell(a, b) for a, b in zip([inputs, *hidden], hidden, strict=False))

    def forward(self, x: Tensor) -> Tensor:
        states: list[Tensor | None] = [None] * len(self.cells)
        for y in x.unbind(1):
            for k, cell in enumerate(self.cells):
                y = states[k] = cell(y, states[k])
        return y


class Stateful(nn.Module):
    """Keeps h and c as attributes; ``resets`` them before each sequence, or goes on from where the last call ended."""

    def __init__(self, inputs: int, hidden: int, *, resets: bool = True) -> None:
        super().__init__()
        self.hid, self.resets, self.conv = hidden, resets, conv(inputs + hidden, 4 * hidden)
        self.h = self.c = None

    def forward(self, x: Tensor) -> Tensor:
        if self.resets:
            self.h = self.c = None
        for y in x.unbind(1):
            if self.h is None:
                n, _, height, width = y.shape
                self.h, self.c = (y.new_zeros(n, self.hid, height, width) for _ in range(2))
            self.h, self.c = lstm(torch.split(self.conv(torch.cat([y, self.h], 1)), self.hid, dim=1), self.c)
        return self.h


class Listed(nn.Module):
    """No cells: the sizes of all states are in one list, and h is read by convolutions of its own."""

    def __init__(self, inputs: int, hidden: list[int]) -> None:
        super().__init__()
        self.hidden_dims = hidden
        self.of_x = nn.ModuleList(conv(a, 4 * b) for a, b in zip([inputs, *hidden], hidden, strict=False))
        self.of_h = nn.ModuleList(conv(b, 4 * b) for b in hidden)

    def forward(self, x: Tensor) -> Tensor:
        n, _, _, height, width = x.shape
        h, c = ([x.new_zeros(n, size, height, width) for size in self.hidden_dims] for _ in range(2))
        for y in x.unbind(1):
            for k in range(len(h)):
                y, c[k] = lstm((self.of_x[k](y) + self.of_h[k](h[k])).chunk(4, 1), c[k])
                h[k] = y
        return y


class Memory(nn.Module):
    """PredRNN's cell, which hands a second state on from layer to layer; the net makes all first states."""

    class Cell(nn.Module):
        def __init__(self, inputs: int, hidden: int) -> None:
            super().__init__()
            self.num_hidden = hidden
            self.conv_x, self.conv_h = conv(inputs, 6 * hidden), conv(hidden, 3 * hidden)
            self.conv_m, self.conv_o = conv(hidden, 3 * hidden), nn.Conv2d(2 * hidden, hidden, 1)

        def forward(self, x: Tensor, h: Tensor, c: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            of_x = torch.split(self.conv_x(x), self.num_hidden, dim=1)
            i, f, g = (a + b for a, b in zip(of_x, torch.split(self.conv_h(h), self.num_hidden, dim=1), strict=False))
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            i, f, g = (
                a + b for a, b in zip(of_x[3:], torch.split(self.conv_m(m), self.num_hidden, dim=1), strict=True)
            )
            m = torch.sigmoid(f) * m + torch.sigmoid(i) * torch.tanh(g)
            return torch.tanh(self.conv_o(torch.cat([c, m], 1))), c, m

    def __init__(self, inputs: int, hidden: list[int]) -> None:
        super().__init__()
        self.num_hidden = hidden
        self.cells = nn.ModuleList(self.Cell(a, b) for a, b in zip([inputs, *hidden], hidden, strict=False))

    def forward(self, x: Tensor) -> Tensor:
        n, _, _, height, width = x.shape
        h = [torch.zeros([n, size, height, width], dtype=x.dtype) for size in self.num_hidden]
        c, m = list(h), torch.zeros([n, self.num_hidden[0], height, width], dtype=x.dtype)
        for y in x.unbind(1):
            for k, cell in enumerate(self.cells):
                y, c[k], m = cell(y, h[k], c[k], m)
                h[k] = y
        return y


class Layers(nn.Module):
    """One tensor of zeros for the states of all layers; what comes out is written into another."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hid = hidden
        self.gates = nn.ModuleList(conv(a + hidden, 4 * hidden) for a in (inputs, hidden))

    def forward(self, x: Tensor) -> Tensor:
        n, steps, _, height, width = x.shape
        h, c = (list(torch.zeros(2, n, self.hid, height, width, dtype=x.dtype)) for _ in range(2))
        out = torch.zeros(n, steps, self.hid, height, width, dtype=x.dtype)
        for t in range(steps):
            y = x[:, t]
            for k, gates in enumerate(self.gates):
                y, c[k] = lstm(torch.split(gates(torch.cat([y, h[k]], 1)), self.hid, 1), c[k])
                h[k] = y
            out[:, t] = y
        return out.mean(1)


class Like(nn.Module):
    """The first state is as what a convolution made: they go together."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.of_x, self.gate, self.new = conv(inputs, hidden), conv(2 * hidden, hidden), conv(2 * hidden, hidden)

    def first(self, y: Tensor) -> Tensor:
        return torch.zeros_like(y)

    def forward(self, x: Tensor) -> Tensor:
        h = None
        for frame in x.unbind(1):
            y = self.of_x(frame)
            h = self.first(y) if h is None else h
            z = torch.sigmoid(self.gate(torch.cat([y, h], 1)))
            h = (1 - z) * h + z * torch.tanh(self.new(torch.cat([y, h], 1)))
        return h


class Literal(Like):
    """The size is a plain number."""

    def first(self, y: Tensor) -> Tensor:
        return torch.zeros(len(y), 8, *y.shape[2:], dtype=y.dtype)


class Shaped(Like):
    """The size is another tensor's, which no tracer sees."""

    def first(self, y: Tensor) -> Tensor:
        return y.new_zeros(y.shape)


class Marked(Like):
    """Not all of it is zero."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__(inputs, hidden)
        self.hid = hidden

    def first(self, y: Tensor) -> Tensor:
        h = torch.zeros(len(y), self.hid, *y.shape[2:], dtype=y.dtype)
        h[:, 0] = 1
        return h


class Linear(nn.Module):
    """A recurrent net of linear layers, written by hand."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden_size, self.of_both, self.of_h = (
            hidden,
            nn.Linear(inputs + hidden, hidden),
            nn.Linear(hidden, hidden),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), self.hidden_size, dtype=x.dtype)
        for y in x.mean((3, 4)).unbind(1):
            h = torch.tanh(self.of_both(torch.cat((y, h), 1)) + self.of_h(h))
        return h[:, :, None, None]


class Video(nn.Module):
    """Encodes every frame, runs a recurrent net over them, reads its last state."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv(3, 12), nn.BatchNorm2d(12), nn.ReLU())
        self.recurrent, self.head = recurrent, nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.head(self.recurrent(frames))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: ConvLSTM(12, [10, 8]),
    "lstm, one size": lambda: ConvLSTM(12, [8, 8]),
    "gru": lambda: ConvGRU(12, [10, 8]),
    "stateful": lambda: Stateful(12, 8),
    "goes on": lambda: Stateful(12, 8, resets=False),
    "listed": lambda: Listed(12, [10, 8]),
    "listed, one size": lambda: Listed(12, [8, 8]),
    "memory": lambda: Memory(12, [8, 8]),
    "layers": lambda: Layers(12, 8),
    "like": lambda: Like(12, 8),
    "literal": lambda: Literal(12, 8),
    "shaped": lambda: Shaped(12, 8),
    "marked": lambda: Marked(12, 8),
    "linear": lambda: Linear(12, 8),
}
