"""How large tiles are: a table by head dimension instead of trials at run time.

Q, K and V of a tile must fit into 99 KB of shared memory, the least that GPUs since Ampere have,
with the loads of `stages` - 1 tiles of keys in flight. Fewer query rows take smaller tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

__all__ = ["Tile", "key_splits", "power_of_two", "tile_for"]

#: Programs in flight that hide one another's waits, a multiprocessor.
_PROGRAMS_A_PROCESSOR = 2
#: The interpreter on a CPU passes for a small GPU, so that tests see keys split.
_PROCESSORS_WITHOUT_GPU = 4
_MOST_SPLITS = 64


@dataclass(frozen=True, slots=True)
class Tile:
    """rows, keys: of a tile; warps: of a program; stages: of its loop over the keys."""

    rows: int
    keys: int
    warps: int
    stages: int


#: By bytes of a number and head dimension up to which it holds.
_TILES = {
    2: {64: Tile(128, 64, 8, 3), 128: Tile(64, 64, 8, 3), 256: Tile(64, 32, 8, 2)},
    4: {64: Tile(64, 32, 8, 2), 128: Tile(32, 32, 8, 2), 256: Tile(16, 32, 8, 1)},
}


def power_of_two(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()


def tile_for(dim: int, dtype: torch.dtype, rows: int) -> Tile:
    """Tiles for `rows` query rows (heads of a group counted each) of `dim` numbers.

    Raises:
        ValueError: a row is too long for any tile.
    """
    sizes = _TILES[dtype.itemsize]
    for longest, tile in sizes.items():
        if dim <= longest:
            # The tensor cores' least is 16.
            fewer = max(16, power_of_two(rows))
            return tile if fewer >= tile.rows else replace(tile, rows=fewer, warps=4)
    raise ValueError(f"head_dim is {dim}; Triton's kernels have tiles up to {max(sizes)}")


def key_splits(programs: int, keys: int, tile: Tile, device: torch.device) -> int:
    """Among how many programs to split the keys of each, so that few rows keep a GPU busy.

    A split has at least two tiles.
    """
    processors = _PROCESSORS_WITHOUT_GPU
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = -(-_PROGRAMS_A_PROCESSOR * processors // programs)
    return max(1, min(wanted, keys // (2 * tile.keys), _MOST_SPLITS))
