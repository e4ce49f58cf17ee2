"""The model in an inference process."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from llmperf import decoding, models, predict
from llmperf.models import mapped
from llmperf.strategies.inference import GroupedSlots


def load(config: dict) -> Callable:
    """Load the model of `config["spec"]`, over the mapped weights in `config["folder"]` if named.

    Returns `slots(batching, rows, max_length, loop, processes, threads)`: something with the
    methods of `decoding.Slots`, one group at a time for `groups`. So many processes share the card.
    """
    spec, folder = config["spec"], config["folder"]
    model = mapped.load(Path(folder), models.LoadSpec(**spec)) if folder else models.load(**spec)
    all_threads = torch.get_num_threads()

    def slots(batching: str, rows: int, max_length: int, loop: str, processes: int, threads):
        predict.cap_allocator(model, processes)
        torch.set_num_threads(threads or all_threads)  # a run before may have had fewer
        if loop == "compiled":
            decoding.warm_up(model, rows, [max_length])
        else:
            decoding.free_graphs()
        if torch.cuda.is_initialized():  # else a small run shows what a large one before it held
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if batching == "slots":
            return decoding.Slots(model, rows, max_length, loop=loop)
        decode = partial(decoding.decode, model, loop=loop, room=(rows, max_length))
        prepared = decoding.prepare(model, loop)
        return GroupedSlots(decode, rows, prepared.loop, prepared.reason)

    return slots
