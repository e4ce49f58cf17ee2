"""PyTorch's caching allocator by its rules (`c10/cuda/CUDACachingAllocator`, torch 2.1 to 2.13)."""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

MIB = 2**20
MIN_BLOCK = 512  # every request is rounded up to a multiple of this
SMALL = MIB  # up to here from the pool of small blocks
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB  # asked of the driver for requests below MIN_LARGE
MIN_LARGE = 10 * MIB  # from here on one segment a request, rounded up to 2 MiB
ROUND_LARGE = 2 * MIB


@dataclass(frozen=True)
class Placed:
    """Bytes `requested` by the tensors, `allocated` to them, `reserved` from the driver."""

    requested: int
    allocated: int
    reserved: int


def rounded(size: int) -> int:
    return max(1, -(-size // MIN_BLOCK)) * MIN_BLOCK


def place(sizes: Iterable[int]) -> Placed:
    """Place tensors of these sizes in bytes, one after another, none freed in between.

    Each is rounded and takes the smallest free block of its pool that holds it. A remainder that is
    too small to split off stays part of the block.
    """
    free: dict[bool, list[int]] = {True: [], False: []}  # sorted sizes of the free blocks, by pool
    requested = allocated = reserved = 0
    for wanted in sizes:
        size = rounded(wanted)
        small = size <= SMALL
        blocks = free[small]
        at = bisect_left(blocks, size)
        if at < len(blocks):
            block = blocks.pop(at)
        else:
            large = LARGE_SEGMENT if size < MIN_LARGE else -(-size // ROUND_LARGE) * ROUND_LARGE
            block = SMALL_SEGMENT if small else large
            reserved += block
        left = block - size
        if left >= MIN_BLOCK if small else left > SMALL:
            insort(blocks, left)
            block = size
        requested += wanted
        allocated += block
    return Placed(requested, allocated, reserved)
