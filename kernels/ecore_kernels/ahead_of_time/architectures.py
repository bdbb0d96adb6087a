"""Limits of the architectures that kernels are compiled for, and the number of blocks that fit on an SM."""

from __future__ import annotations

from typing import NamedTuple


class Multiprocessor(NamedTuple):
    """Capacity of one multiprocessor (SM) of an architecture: CUDA C++ Programming Guide, technical specifications."""

    shared: int  # bytes
    warps: int
    blocks: int
    registers: int = 65_536

    @property
    def shared_per_block(self) -> int:
        """Bytes that one thread block may use: the driver keeps some for itself in every block."""
        return self.shared - RESERVED_SHARED


RESERVED_SHARED = 1024  # bytes a block
SHARED_UNIT = 128  # bytes that shared memory is handed out in
REGISTER_UNIT = 256  # registers that a warp gets at a time
WARP_UNIT = 4  # an SM's registers lie in four equal parts, and a warp in one of them

ARCHITECTURES = {
    80: Multiprocessor(shared=164 * 1024, warps=64, blocks=32),
    86: Multiprocessor(shared=100 * 1024, warps=48, blocks=16),
    89: Multiprocessor(shared=100 * 1024, warps=48, blocks=24),
    90: Multiprocessor(shared=228 * 1024, warps=64, blocks=32),
}


def occupancy(architecture: int, warps: int, registers: int, shared: int) -> tuple[int, str]:
    """Return the number of thread blocks that an SM holds at a time, and the limit that prevents more.

    Args:
        warps: of a block.
        registers: of a thread.
        shared: bytes of a block.
    """
    sm = ARCHITECTURES[architecture]
    if shared > sm.shared_per_block:
        return 0, "shared memory"
    of_warp = -(-max(registers, 1) * 32 // REGISTER_UNIT) * REGISTER_UNIT
    warps_by_registers = sm.registers // of_warp // WARP_UNIT * WARP_UNIT
    of_block = -(-(shared + RESERVED_SHARED) // SHARED_UNIT) * SHARED_UNIT
    limits = {
        "warps": sm.warps // warps,
        "blocks": sm.blocks,
        "registers": warps_by_registers // warps,
        "shared memory": sm.shared // of_block,
    }
    limit = min(limits, key=limits.__getitem__)
    return limits[limit], limit
