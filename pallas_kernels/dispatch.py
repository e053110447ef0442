"""What the ops share before their kernels run: checks, the platform, the sizes of steps."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import blocks as tables
from pallas_kernels import sequence
from pallas_kernels.blocks import Blocks

LANES = 128  # of a vector register
WIDEST = 256  # channels of a head that the table of sizes has
# Chips of the table of sizes, by what JAX calls their devices.
CHIPS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def check_tokens(q, k, v, state, initial, starts, read: str) -> None:
    """Raises ValueError, by name, where shapes or dtypes do not belong together."""
    if q.ndim != 4 or k.shape != q.shape or v.shape[:3] != q.shape[:3] or v.ndim != 4:
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} must be [B, T, H, K], the same, and"
            " [B, T, H, V]"
        )
    if min(q.shape[1:3]) < 1:
        raise ValueError(f"q {q.shape} must have a token and a head")
    if len({x.dtype for x in (q, k, v)}) > 1 or q.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"q {q.dtype}, k {k.dtype} and v {v.dtype} must all be float32 or all bfloat16"
        )
    batch, _, heads, size = q.shape
    wanted = (batch, heads, size, v.shape[3])
    if state.shape != wanted or state.dtype != jnp.float32:
        raise ValueError(f"state {state.dtype}{state.shape} must be float32{wanted}")
    if initial is not None:
        if starts is None:
            raise ValueError("initial is what documents begin from: give starts too")
        if initial.shape != wanted[1:] or initial.dtype != jnp.float32:
            raise ValueError(f"initial {initial.dtype}{initial.shape} must be float32{wanted[1:]}")
    if starts is not None and (starts.shape != q.shape[:2] or starts.dtype != jnp.bool_):
        raise ValueError(f"starts {starts.dtype}{starts.shape} must be bool{q.shape[:2]}")
    if read not in ("after", "before"):
        raise ValueError(f'read {read!r} must be "after" or "before"')


def check_gates(q, *, lr, log_decay) -> None:
    """Raises ValueError, by name, where a gate does not fit q [B, T, H, K]."""
    if lr.shape != q.shape[:3]:
        raise ValueError(f"lr {lr.shape} must be [B, T, H] = {q.shape[:3]}")
    if log_decay is not None and log_decay.shape not in (q.shape[:3], q.shape):
        raise ValueError(
            f"log_decay {log_decay.shape} must be [B, T, H] = {q.shape[:3]} or [B, T, H, K] ="
            f" {q.shape}"
        )


def kernel(implementation: str | None, interpret: Any) -> bool:
    """Whether to run the Pallas kernel."""
    if implementation not in (None, "pallas", "xla"):
        raise ValueError(f'implementation {implementation!r} must be None, "pallas" or "xla"')
    if implementation is None:
        return bool(interpret) or jax.default_backend() == "tpu"
    if implementation == "xla" and interpret:
        raise ValueError('interpret is of the kernel: leave it out with implementation="xla"')
    return implementation == "pallas"


def initial(given, state, starts) -> tuple[jax.Array, ...]:
    """What documents begin from, where any begin."""
    if starts is None:
        return ()
    return (jnp.zeros(state.shape[1:], state.dtype) if given is None else given,)


def split(wide, gates, log_decay):
    """(arrays of every token and head, numbers of every token and head), log decays among them."""
    if log_decay is None:
        return wide, gates
    if log_decay.ndim == 4:
        return (*wide, log_decay), gates
    return wide, (*gates, log_decay)


def here() -> str | None:
    """The chip to compile for: of the mesh that is set, else the default one; None = no TPU."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return CHIPS.get(device.device_kind)


def plan(
    tile,
    name: str,
    q,
    v,
    log_decay,
    blocks,
    *,
    kernel: bool,
    interpret: Any,
    chunk: int | None = None,
    larger: float = 1.0,
    chip: str | None = None,
):
    """The plan of a call: sizes from the table, made to fit the heads.

    Args:
        chunk: tokens a tile, where that is not the table's to choose.
        larger: how many times the VMEM of what the table is of the call takes.
        chip: whose sizes; None = of the chip that is compiled for.
    """
    decay = _decay(log_decay)
    dims = q.shape[3], v.shape[3]
    if blocks is None:
        blocks = tables.find(name, decay, max(dims), chip or here())
        larger *= _larger(dims, q.dtype)
        fewer = (None if n is None else max(1, int(n / larger)) for n in blocks[2:])
        tiles = 1 if chunk is not None and larger > 1 else blocks.tiles
        blocks = Blocks(blocks.block, tiles, *fewer)
    block, tiles, most, backward = blocks
    block, backward = chunk or block, most if backward is None else backward
    if block < 16 or block & (block - 1) or min(tiles, most, backward) < 1:
        raise ValueError(
            f"blocks {blocks}: block must be a power of two of at least 16, tiles and heads at"
            " least 1"
        )
    heads = q.shape[2]
    return sequence.Plan(
        tile,
        f"{name}_{decay}",
        block,
        tiles,
        heads_of_step(heads, dims, most) if kernel else heads,
        heads_of_step(heads, dims, backward) if kernel else heads,
        q.dtype,
        interpret=pltpu.InterpretParams() if interpret is True else interpret,
    )


def _decay(log_decay) -> str:
    """What the table calls a decay of [B, T, H], of [B, T, H, K], or None."""
    return {None: "none", 3: "head", 4: "channel"}[None if log_decay is None else log_decay.ndim]


def _larger(dims, dtype) -> float:
    """How many times the VMEM of a head of the table a head takes: its rows are of bf16, to 256."""
    key, value = (-(-dim // LANES) * LANES / WIDEST for dim in dims)
    return max(1.0, key, value, key * value) * (2 if dtype == jnp.float32 else 1)


def fits(name: str, heads: int, dims, log_decay, dtype, chip: str | None = None) -> bool:
    """Whether a step of an affine op is known to fit in VMEM, forward and backward.

    A step of the table is, and so is one of no more heads that are no larger. Heads that fill
    registers only together can make it take more: 16 of 200 channels.

    Args:
        name: "delta_rule" or "linear_attention".
        heads: of a device.
        dims: K and V.
        log_decay: like what the op takes, or None.
        dtype: of q.
        chip: whose sizes; None = of the chip that is compiled for.
    """
    blocks = tables.find(name, _decay(log_decay), max(dims), chip or here())
    most = min(n for n in blocks[2:] if n is not None) / _larger(dims, dtype)
    return heads_of_step(heads, dims, 1) <= most


def heads_of_step(heads: int, dims, most: int) -> int:
    """The largest divisor of the heads, at most `most`, whose channels fill whole registers."""
    together = math.lcm(*(LANES // math.gcd(LANES, dim) for dim in dims))
    fitting = [n for n in range(1, heads + 1) if heads % n == 0 and n % together == 0]
    if not fitting:
        raise ValueError(
            f"{heads} heads of {dims} channels do not fill registers of {LANES}: the TPU kernel"
            f' wants a multiple of {together} heads; use implementation="xla"'
        )
    return max([n for n in fitting if n <= most], default=fitting[0])
