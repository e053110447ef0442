"""The notation of memjax: one table of names, shared by all code.

Arrays are `[batch, time, heads, dim]`, as in `jax.nn.dot_product_attention`. In annotations and
shape suffixes these letters stand for:

| letter | axis | letter | axis |
|---|---|---|---|
| `B` | batch | `T` | time (tokens) |
| `H` | heads | `D` | dimension of a head |
| `K` | key (and query) dimension of a head | `V` | value dimension of a head |
| `E` | model dimension ("embed") | `F` | hidden dimension of a feed-forward layer |
| `C` | chunk | `N` | number of chunks |
| `P` | persistent tokens | `W` | attention window |
| `S` | segment | `L` | layers |
| `Q` | vocabulary | | |

Symbols of the papers and their names here: theta `lr` (inner learning rate), eta `momentum`,
a = 1 - alpha `retain`, W_0 the initial memory, M(x; W) `structure.apply(weights, x)`.

The annotations are checked (jaxtyping with beartype) while the tests run; in use they cost nothing.
"""

from jaxtyping import Array, Bool, Float, Int, PyTree
from jaxtyping import PRNGKeyArray as Key

__all__ = ["Array", "Bool", "Float", "Int", "Key", "PyTree"]
