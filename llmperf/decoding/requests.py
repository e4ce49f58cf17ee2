"""The same seeded requests for every strategy, and how their tokens are drawn. Without torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmperf import DATA

LOOPS = ("recompute", "cached", "compiled")
DEFAULT_LOOP = "compiled"
WINDOW = 200  # tokens that the published loop looks back


def graph_size(rows: int, length: int) -> tuple[int, int]:
    """Rows and tokens of a CUDA graph's static buffers: powers of two, at least 256 tokens."""
    return 1 << (rows - 1).bit_length(), max(256, 1 << (length - 1).bit_length())


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults are greedy off, full distribution.

    Order of the publication and of transformers' processors: temperature, suppress, top-k, top-p.
    """

    greedy: bool = False
    temperature: float = 1.0  # 1: the model's own distribution
    top_k: int | None = None  # keep the k likeliest tokens
    top_p: float | None = None  # of those, the smallest set that holds this much probability
    suppress: tuple[int, ...] = ()  # never drawn; the publication suppresses the unknown token

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}: it must be above 0 (or greedy)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}: it must be at least 1, or None for no limit")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must be above 0 and at most 1")


GREEDY = Sampling(greedy=True)
PUBLISHED = Sampling(temperature=1.0, top_k=50, top_p=0.9)  # the study's loop; its values unprinted


@dataclass(frozen=True)
class Stop:
    """When a request ends.

    Forced length (the default) ignores every end token, so that each strategy does the same work.
    A token of `end_ids` ends a request at any time. With `min_tokens`, which counts the prompt as
    well, a token of `sentence_ids` ends it from that length on, and so does `pair[1]` when the
    prompt's last token is `pair[0]`.
    """

    end_ids: frozenset[int] = frozenset()
    sentence_ids: frozenset[int] = frozenset()
    min_tokens: int | None = None
    pair: tuple[int, int] | None = None

    def ends(self, token: int, generated: int, prompt_ids: Sequence[int] = ()) -> bool:
        """Whether `token`, the `generated`-th new one (from 1), is the last."""
        if token in self.end_ids:
            return True
        if self.min_tokens is None or len(prompt_ids) + generated < self.min_tokens:
            return False
        return token in self.sentence_ids or (*prompt_ids[-1:], token) == self.pair


@dataclass(frozen=True)
class Request:
    """One prompt as token ids, how many tokens to generate, and the seed of its random stream."""

    id: int
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    seed: int = 0
    arrival_s: float = 0.0

    def __post_init__(self):
        if not self.prompt_ids:
            raise ValueError(f"request {self.id} has an empty prompt: give at least one token")
        if self.max_new_tokens < 1:
            raise ValueError(
                f"request {self.id} asks for {self.max_new_tokens} new tokens: ask for at least 1"
            )

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the whole answer."""
        return len(self.prompt_ids) + self.max_new_tokens


@dataclass(frozen=True)
class Workload:
    """Requests, each of the length it asks for, and how their tokens are drawn."""

    requests: tuple[Request, ...]
    sampling: Sampling = Sampling()

    def __post_init__(self):
        if not self.requests:
            raise ValueError("a workload needs at least one request")


def check_length(r: Request, most: int, holds: str) -> None:
    """Raise ValueError for a request of more than `most` tokens; `holds`: what has {} of them."""
    if r.length > most:
        raise ValueError(
            f"request {r.id}: {len(r.prompt_ids)} prompt tokens + {r.max_new_tokens} new tokens ="
            f" {r.length}, but {holds.format(most)}: shorten one of the two"
        )


def prompts(path: Path | None = None) -> list[dict]:
    """The kit's own prompts: a list of {id, kind, language, text}, in the file's order."""
    path = path or DATA / "prompts.jsonl"
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def several(lengths: int | Sequence[int]) -> Sequence[int]:
    """Lengths that requests cycle through: those given, or the one."""
    return lengths if isinstance(lengths, Sequence) else (lengths,)


def build(
    tokenizer,
    n: int,
    prompt_tokens: int | Sequence[int],
    new_tokens: int | Sequence[int],
    *,
    seed: int = 0,
    sampling: Sampling | None = None,
) -> Workload:
    """`n` requests from the kit's prompts, each cut or repeated to an exact number of tokens.

    `prompt_tokens` and `new_tokens` are one number for all, or a sequence that is cycled through.
    Request i depends on i, `seed` and the lengths only: a load of 4 is the start of a load of 8.
    """
    asked = {"n": n, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    for name, counts in asked.items():
        if min(several(counts)) < 1:
            raise ValueError(f"{name} is {counts}: it must be at least 1")
    texts, lengths, new = prompts(), several(prompt_tokens), several(new_tokens)
    requests = []
    for i in range(n):
        ids = tokenizer(texts[i % len(texts)]["text"], add_special_tokens=False)["input_ids"]
        length = lengths[i % len(lengths)]
        tiled = (ids * (length // len(ids) + 1))[:length]
        requests.append(Request(i, tuple(tiled), new[i % len(new)], seed=seed * 1_000_003 + i))
    return Workload(tuple(requests), sampling or Sampling())


MARKS = (".", "。", "!", "！", " ", "?", "？", ",", "，", ";", "；", ":", "：")


def published_stop(tokenizer, min_tokens: int) -> Stop:
    """The publication's rule, as printed, from `min_tokens` on (prompt and answer together).

    A token that reads as one of the marks ends the text, a blank among them; so does token 3 when
    the prompt ends with token 8 (the printed loop never updates `last_token_id`); the tokenizer's
    end token ends it at any length. Source: `predict_one_sample` in the publication.
    """
    if min_tokens < 1:
        raise ValueError(f"min_tokens is {min_tokens}: it must be at least 1")
    vocabulary, end = tokenizer.get_vocab(), tokenizer.eos_token_id
    sentence = frozenset(vocabulary[mark] for mark in MARKS if mark in vocabulary)
    return Stop(frozenset() if end is None else frozenset({end}), sentence, min_tokens, (8, 3))


def published_sampling(tokenizer) -> Sampling:
    """The published sampling: top-k, top-p, and the unknown token, if there is one, suppressed."""
    unknown = tokenizer.unk_token_id
    return replace(PUBLISHED, suppress=() if unknown is None else (unknown,))
