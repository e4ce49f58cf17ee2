"""Slots: rows of one step that requests enter and leave, each at a position of its own.

A batch that starts together, dynamic batching and continuous batching fill the same slots. A
prompt enters in pieces, so that requests that already decode do not wait for all of it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from llmperf.decoding import cpu_step, graph_step
from llmperf.decoding.batch import Piece, run_piece
from llmperf.decoding.loops import prepare
from llmperf.decoding.requests import DEFAULT_LOOP, Request, Stop, check_length, graph_size
from llmperf.decoding.sampling import Sampling, uniforms

# Prompt tokens in one step while other requests decode. JOINT (the step in C): of every prompt, as
# rows of the same pass. SEPARATE (elsewhere): of one prompt, in a pass of its own.
JOINT_PREFILL_TOKENS, SEPARATE_PREFILL_TOKENS = 8, 64


@dataclass
class _Row:
    """A request in its slot."""

    key: object
    request: Request
    uniforms: torch.Tensor  # (max_new_tokens,)
    cached: int = 0  # its tokens that are in the cache
    generated: int = 0
    token: int = 0  # the last one generated


class Slots:
    """`rows` slots of up to `max_length` tokens each. Not for several threads at once.

    All requests are drawn by `sampling`, which may be set, and end by `stop`. `loop` and `reason`
    say which loop runs and why it is not the one asked for (`loops.prepare`).
    """

    def __init__(self, model, rows: int, max_length: int, *, loop: str = DEFAULT_LOOP,
                 sampling: Sampling | None = None, stop: Stop | None = None):  # fmt: skip
        if rows < 1:
            raise ValueError(f"{rows} rows: use at least 1")
        if loop == "recompute":
            raise ValueError("recompute keeps no keys and values: choose cached or compiled")
        chosen = prepare(model, loop)
        self.model, self.max_length = model, max_length
        self.sampling, self.stop = sampling or Sampling(), stop or Stop()
        self.loop, self.reason = chosen.loop, chosen.reason
        if chosen.step is None:
            self._engine = _EagerRows(model)
        elif isinstance(chosen.step, graph_step.GraphStep):
            self._engine = graph_step.GraphRows(chosen.step, rows, max_length)
        else:
            self._engine = cpu_step.CpuRows(chosen.step, rows, max_length)
        self._next_tokens = chosen.next_tokens
        self._rows: list[_Row | None] = [None] * rows

    @property
    def free(self) -> int:
        """How many slots hold no request."""
        return self._rows.count(None)

    @property
    def busy(self) -> bool:
        """Whether any slot holds a request."""
        return self.free < len(self._rows)

    def admit(self, key: object, request: Request) -> None:
        """Put a request into a free slot; its tokens come from later steps under `key`.

        Raises ValueError when it is longer than a slot, or no slot is free.
        """
        check_length(request, self.max_length, "a slot holds {} tokens")
        if None not in self._rows:
            raise ValueError(f"all {len(self._rows)} slots are taken: step until one is free")
        draws = uniforms([request.seed], request.max_new_tokens)[0]
        self._rows[self._rows.index(None)] = _Row(key, request, draws)

    def drop(self, key: object) -> None:
        """Free the slot of a request that is no longer wanted; nothing happens if it has ended."""
        self._rows = [None if row and row.key == key else row for row in self._rows]

    def step(self) -> list[tuple[object, int, bool]]:
        """One step for all slots: (key, token, whether it is the last) of each request.

        A request whose prompt is not yet whole gets none.
        """
        pieces = self._pieces()
        if not pieces:
            return []
        # compiled functions of torch guard on the mode, so no_grad and not inference_mode
        with torch.no_grad():
            logits = self._engine.forward(pieces)  # (pieces that end in a token, vocabulary)
            for piece in pieces:
                self._rows[piece.slot].cached = piece.end
            ready = [piece.slot for piece in pieces if piece.last]
            if not ready:
                return []
            rows = [self._rows[slot] for slot in ready]
            uniform = torch.stack([r.uniforms[r.generated] for r in rows]).to(logits.device)
            tokens = self._next_tokens(logits, self.sampling, uniform).tolist()
        return [self._take(slot, token) for slot, token in zip(ready, tokens, strict=True)]

    def _pieces(self) -> list[Piece]:
        """The last token of each decoding request, and pieces of prompts: whole ones where no
        request decodes."""
        any_decodes = any(row and row.generated for row in self._rows)
        together = isinstance(self._engine, cpu_step.CpuRows)
        most = JOINT_PREFILL_TOKENS if together else SEPARATE_PREFILL_TOKENS
        most = most if any_decodes else None
        decoding, prompts = [], []
        for slot, row in enumerate(self._rows):
            if row and row.generated:
                decoding.append(Piece(slot, (row.token,), row.cached, True))
            elif row:
                prompt = row.request.prompt_ids
                ids = prompt[row.cached :][:most]
                whole = row.cached + len(ids) == len(prompt)
                prompts.append(Piece(slot, ids, row.cached, whole))
        return decoding + (prompts if together or not any_decodes else prompts[:1])

    def _take(self, slot: int, token: int) -> tuple[object, int, bool]:
        row = self._rows[slot]
        row.token, row.generated = token, row.generated + 1
        ended = self.stop.ends(token, row.generated, row.request.prompt_ids)
        last = ended or row.generated == row.request.max_new_tokens
        if last:
            self._rows[slot] = None
        return row.key, token, last


class _EagerRows:
    """What runs where no step is compiled: each slot with its own cache, one after another."""

    def __init__(self, model):
        self._model, self._caches = model, {}

    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Logits (pieces with `last`, vocabulary)."""
        found = [run_piece(self._model.module, p, self._caches) for p in pieces]
        wanted = [logits for piece, logits in zip(pieces, found, strict=True) if piece.last]
        return torch.cat(wanted) if wanted else torch.empty(0)


def warm_up(model, rows: int, lengths: Iterable[int], copies: int = 1) -> None:
    """On a GPU, make the buffers and graphs of each batch up to `rows` with room for so many
    tokens, so that none is made while a run is measured; `copies` of them for batches that are
    decoded in turn. All others are freed. A step on a CPU has no sizes."""
    step = prepare(model).step
    if not isinstance(step, graph_step.GraphStep):
        return
    sizes = {graph_size(rows, length): length for length in lengths}
    if {size: len(kept) for size, kept in step.kept.items()} != dict.fromkeys(sizes, copies):
        graph_step.free_graphs()
    counts = {rows, *(1 << i for i in range(rows.bit_length()))}  # that have a graph each
    for length in sizes.values():
        for slots in [Slots(model, rows, length) for _ in range(copies)]:
            for count in sorted(counts):
                for key in range(count):
                    slots.admit(key, Request(key, (0,), 2))
                while slots.busy:
                    slots.step()
