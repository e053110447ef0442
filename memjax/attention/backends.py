"""The kernels behind `window.attend`: what each can compute, which one is picked, and the calls.

* `xla`: `jax.nn.dot_product_attention`, everywhere, every case.
* `splash`: JAX's Pallas kernel for TPU. Causal and sliding windows, with documents, from the start
  of a sequence (no cache), without prefix; without sinks where they would lie outside the window.
* `cudnn`: cuDNN's flash attention on NVIDIA GPUs through `jax.nn.dot_product_attention`; fp16 and
  bf16.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec

from memjax import sharding
from memjax.typing import Array, Bool, Float, Int

IMPLEMENTATIONS = ("xla", "splash", "cudnn")

# splash attention moves whole tiles of 128 lanes; larger blocks amortise its grid steps
_LANES = 128
_BLOCK = 512


def splash_limit(
    q: Array, *, fresh: bool, window: int, sinks: int = 0, prefix: bool = False
) -> str | None:
    """Why splash attention cannot compute this call, or None if it can.

    Args:
        q: [B, T, H, D], the queries (their shape and dtype are read).
        fresh: whether the call starts the sequence: no cache.
        window: tokens that a token sees, itself included.
        sinks: sink tokens.
        prefix: whether there is a prefix.
    """
    if not fresh:
        return "it takes no cache; start a sequence without one"
    if prefix:
        return "it takes no prefix together with documents; use no prefix"
    if sinks and q.shape[1] > window:
        return f"it takes no sinks outside the window; use sinks=0 or window >= {q.shape[1]}"
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it computes in float32 and bfloat16, not {q.dtype}"
    return None


def cudnn_limit(q: Array) -> str | None:
    """Why cuDNN's flash attention cannot compute this call, or None if it can.

    Args:
        q: [B, T, H, D], the queries (their shape and dtype are read).
    """
    dim = q.shape[3]
    if sharding.platform() != "gpu":
        return f"it needs an NVIDIA GPU; the platform is {sharding.platform()}"
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"it computes in float16 and bfloat16, not {q.dtype}"
    if dim % 8 or dim > 256:
        return f"head_dim {dim} must be a multiple of 8, at most 128 (256 from Hopper on)"
    return None


def choose(
    implementation: str | None,
    q: Array,
    *,
    fresh: bool,
    window: int,
    sinks: int = 0,
    prefix: bool = False,
) -> str:
    """The name of the kernel that computes a call.

    Args:
        implementation: one of `IMPLEMENTATIONS`, which is then checked against its limits; None =
            splash attention on TPU where its limits allow, else xla.
        q: [B, T, H, D], the queries (their shape and dtype are read).
        fresh: whether the call starts the sequence: no cache.
        window: tokens that a token sees, itself included.
        sinks: sink tokens.
        prefix: whether there is a prefix.

    Returns:
        One of `IMPLEMENTATIONS`.

    Raises:
        ValueError: an unknown name, or a call that the named kernel cannot compute.
    """
    limit = functools.partial(
        splash_limit, q, fresh=fresh, window=window, sinks=sinks, prefix=prefix
    )
    if implementation is None:
        return "splash" if sharding.platform() == "tpu" and limit() is None else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation {implementation!r} must be None or one of {IMPLEMENTATIONS}"
        )
    wrong = None
    if implementation == "splash":
        wrong = limit()
    elif implementation == "cudnn":
        wrong = cudnn_limit(q)
    if wrong is not None:
        raise ValueError(
            f'implementation="{implementation}" cannot compute this call: {wrong}, '
            'or use implementation="xla"'
        )
    return implementation


def dense(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G D"],
    mask: Bool[Array, "B T S"] | None,
    implementation: str,
    window: int | None = None,
) -> Float[Array, "B T H D"]:
    """Attention through `jax.nn.dot_product_attention`.

    Args:
        q: [B, T, H, D].
        k, v: [B, S, G, D]; H is a multiple of G.
        mask: [B, T, S], what each query sees; None = causal.
        implementation: xla or cudnn.
        window: with mask None, how many tokens a token sees, itself included; None = all before.

    Returns:
        [B, T, H, D] in the dtype of q.
    """
    dtype = q.dtype
    if dtype == jnp.float16 and implementation == "xla" and sharding.platform() != "gpu":
        # only GPUs multiply fp16 into fp32
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    if mask is None:
        local = None if window is None else (window - 1, 0)
        masks = {"is_causal": True, "local_window_size": local}
    else:
        masks = {"mask": mask[:, None]}
    y = jax.nn.dot_product_attention(q, k, v, implementation=implementation, **masks)
    return y.astype(dtype)


def splash(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T G D"],
    v: Float[Array, "B T G D"],
    *,
    window: int,
    number: Int[Array, "B T"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """Causal or sliding-window attention by JAX's splash attention kernel for TPU.

    Under the mesh of `jax.set_mesh` each device computes its share of the batch and of the heads.

    Args:
        q: [B, T, H, D].
        k, v: [B, T, G, D]; H is a multiple of G.
        window: tokens that a token sees, itself included.
        number: [B, T], the document of each token; None = one.
        interpret: run the kernel's interpreter (slow, on any platform).

    Returns:
        [B, T, H, D] in the dtype of q.
    """
    batch, time, _, dim = q.shape
    whole = _LANES * math.ceil(time / _LANES)
    block = min(_BLOCK, whole, _LANES * math.ceil(min(window, whole) / _LANES))
    # a last block that is partly padding: causal, so that no token sees it
    padding = -time % block
    number = jnp.zeros((batch, time), jnp.int32) if number is None else number
    scaled = (q.astype(jnp.float32) / math.sqrt(dim)).astype(q.dtype)
    pad = ((0, 0), (0, padding), (0, 0), (0, 0))
    arrays = [jnp.pad(x, pad).swapaxes(1, 2) for x in (scaled, k, v)]
    arrays.append(jnp.pad(number, ((0, 0), (0, padding)), mode="edge"))

    def local(q, k, v, number):
        kernel = _kernel(q.shape[1], time + padding, window, block, interpret)
        ids = splash_attention.SegmentIds(q=number, kv=number)
        return jax.vmap(kernel)(q, k, v, segment_ids=ids)

    y = _over_mesh(local, *arrays)
    return y.swapaxes(1, 2)[:, :time]


def _kernel(heads: int, time: int, window: int, block: int, interpret: bool):
    shape = (time, time)
    if window >= time:
        mask = splash_attention.CausalMask(shape)
    else:
        mask = splash_attention.LocalMask(shape, (window - 1, 0), offset=0)
    sizes = splash_attention.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )


def _over_mesh(local, q, k, v, number):
    """Runs `local` on each device's share: the compiler cannot partition a Pallas kernel."""
    for name, heads in (("query heads", q.shape[1]), ("kv_heads", k.shape[1])):
        if heads % sharding.devices_along("heads"):
            raise ValueError(
                f"splash attention cannot split {heads} {name} over the mesh's"
                f" {sharding.devices_along('heads')} devices for heads; make the tensor axis a"
                ' divisor of them or use implementation="xla"'
            )
    array = PartitionSpec("batch", "heads")
    axes = (array, array, array, PartitionSpec("batch"))
    dims = {"batch": q.shape[0], "heads": k.shape[1]}
    return sharding.on_each_device(local, (q, k, v, number), axes, array, dims=dims)
