"""Small mixers, registered as a later family would register its own."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memjax import documents
from memjax.layers import Linear
from memjax.layers.statistics import MemoryStats
from memjax.models import LanguageModel, LanguageModelConfig, mixers
from memjax.typing import Array, Float, Int


class AverageState(NamedTuple):
    average: Float[Array, "B E"]
    segment: Int[Array, "B"]
    seen: Int[Array, "B"]
    stats: MemoryStats


class MovingAverage(nnx.Module):
    """`a_t = r a_{t-1} + (1 - r) x_t W cos(position_t)`, from zero at document starts."""

    def __init__(self, dim, heads, *, rngs):
        self.dim, self.heads = dim, heads
        self.projection = Linear(dim, dim, axes=("embed", "heads"), rngs=rngs)
        self.rate = nnx.Param(jax.random.normal(rngs.params(), (dim,)), axes=("heads",))
        self.out = Linear(dim, dim, axes=("heads", "embed"), rngs=rngs)

    def start(self, batch):
        zeros = jnp.zeros((batch, self.heads))
        return AverageState(
            jnp.zeros((batch, self.dim)),
            jnp.full((batch,), -1, jnp.int32),
            jnp.zeros((batch,), jnp.int32),
            MemoryStats(zeros, zeros, None, zeros),
        )

    def __call__(self, x, state=None, *, segment_ids=None, positions=None):
        state = self.start(x.shape[0]) if state is None else state
        place = documents.follow(segment_ids, state.segment, state.seen, x.shape[1])
        positions = place.index if positions is None else positions
        written = self.projection(x).astype(jnp.float32) * jnp.cos(positions)[..., None]
        rate = jax.nn.sigmoid(self.rate[...])

        def step(average, token):
            value, first = token
            average = jnp.where(first[:, None], 0.0, average) * rate + (1 - rate) * value
            return average, average

        new = jnp.diff(place.number, axis=1, prepend=0) > 0
        average, y = jax.lax.scan(step, state.average, (written.swapaxes(0, 1), new.T))
        surprise = jnp.square(y).mean((0, 2))[:, None] * jnp.ones((1, self.heads))
        stats = MemoryStats(surprise, 0 * surprise + 0.5, None, 0 * surprise + rate.mean())
        y = self.out(y.swapaxes(0, 1).astype(x.dtype))
        return y, AverageState(average, place.last, place.seen, stats)


@mixers.register("toy_average")
def average(config, rngs):
    return MovingAverage(config.dim, config.heads, rngs=rngs)


def config_of(**changes):
    fields = {
        "vocab": 32,
        "dim": 16,
        "layers": 2,
        "heads": 2,
        "hidden": 32,
        "pattern": ("toy_average",),
        "context": 16,
        "window": 5,
        "dtype": "float32",
    }
    return LanguageModelConfig(**(fields | changes))


def model_of(seed=0, **changes):
    return LanguageModel(config_of(**changes), rngs=nnx.Rngs(seed))


def tokens_of(batch=2, time=12, vocab=32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab, (batch, time)), jnp.int32)


def call(model):
    """The model as a jitted function of (tokens, state, segment_ids, positions)."""
    graphdef, params = nnx.split(model)

    @jax.jit
    def run(tokens, state=None, segment_ids=None, positions=None):
        merged = nnx.merge(graphdef, params)
        return merged(tokens, state, segment_ids=segment_ids, positions=positions)

    return run


def loss_and_grad(model):
    """A jitted function of (params, tokens): mean loss of the next token and its gradients."""
    graphdef, params = nnx.split(model, nnx.Param)

    def loss(params, tokens):
        logits, _ = nnx.merge(graphdef, params)(tokens)
        likelihood = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(likelihood, tokens[:, 1:, None], axis=-1).mean()

    return jax.jit(jax.value_and_grad(loss)), params
