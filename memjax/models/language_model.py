"""The language model: any pattern of blocks, with one entry for training and decoding."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from memjax import documents
from memjax.layers import RMSNorm
from memjax.layers.linear import fan_in_normal
from memjax.models import remat
from memjax.models.blocks import RESIDUAL, Block
from memjax.models.config import LanguageModelConfig
from memjax.sharding import constrain, constrain_params
from memjax.typing import Array, Float, Int, PyTree

EMBEDDING_STDDEV = 0.02


class LanguageModelState(NamedTuple):
    """What `LanguageModel` carries from one call to the next.

    Args:
        blocks: for each name in the pattern, the states of its blocks, stacked: leaves [L, ...]
            with L = `config.repeats`.
        segment: id of the last token; -1 = nothing seen yet.
        seen: tokens of the running document so far.
    """

    blocks: tuple[Any, ...]
    segment: Int[Array, "B"]
    seen: Int[Array, "B"]


class LanguageModel(nnx.Module):
    """Predicts the next token: `logits = head(norm(block_L(... block_1(embedding[tokens]))))`.

    The blocks follow `config.pattern`, repeated. The parameters of its repeats are stacked (leading
    logical axis "layers") and one `jax.lax.scan` runs over them, so that the time to compile does
    not grow with the depth. Training splits the model once, outside jit:

        graphdef, params = nnx.split(model, nnx.Param)
        logits, state = nnx.merge(graphdef, params)(tokens)     # inside jit, grad, ...

    The embedding starts normal with deviation 0.02; every other matrix, an untied head included,
    normal with deviation 1/sqrt(inputs), cut at two deviations; norms start at one.

    Args:
        config: what to build.
        rngs: the stream `params` draws the weights.
    """

    def __init__(self, config: LanguageModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        embedding = jax.random.normal(rngs.params(), (config.vocab, config.dim), jnp.float32)
        self.embedding = nnx.Param(embedding * EMBEDDING_STDDEV, axes=("vocab", "embed"))

        def builder(mixer: str, feed_forward: str) -> Callable[[nnx.Rngs], Block]:
            return lambda rngs: Block(config, mixer, feed_forward, rngs=rngs)

        names = zip(config.pattern, config.feed_forwards, strict=True)
        self.blocks = nnx.List([_stack(builder(*n), config.repeats, rngs) for n in names])
        self.norm = RMSNorm(config.dim, rngs=rngs)
        if config.tied:
            self.head_kernel = None
        else:
            head = fan_in_normal(rngs.params(), (config.dim, config.vocab), config.dim)
            self.head_kernel = nnx.Param(head, axes=("embed", "vocab"))

    def start(self, batch: int) -> LanguageModelState:
        """The state before the first token.

        Args:
            batch: B.
        """
        repeats = self.config.repeats

        def start(module: Block) -> Any:
            graphdef, values = nnx.split(module)
            return jax.vmap(lambda v: nnx.merge(graphdef, v).start(batch), axis_size=repeats)(
                values
            )

        return LanguageModelState(
            blocks=tuple(start(module) for module in self.blocks),
            segment=jnp.full((batch,), -1, jnp.int32),
            seen=jnp.zeros((batch,), jnp.int32),
        )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        state: LanguageModelState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T Q"], LanguageModelState]:
        """Logits of the token after each token: `head(hidden(tokens))`.

        Args:
            tokens: [B, T], ids below `config.vocab`; any other gives NaN from there on in its
                document, and through attention anywhere in its row.
            state: of the tokens before; None: there are none. Splitting a sequence anywhere and
                carrying the state changes nothing.
            segment_ids: [B, T], which document each token belongs to; documents do not see one
                another. None: all continue the document of the state.
            positions: [B, T], place of each token in its document; None: counted.

        Returns:
            (logits [B, T, Q] fp32, state).

        Raises:
            ValueError: shapes that do not agree.
        """
        x, state = self.hidden(tokens, state, segment_ids=segment_ids, positions=positions)
        return self.head(x), state

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        state: LanguageModelState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], LanguageModelState]:
        """What `head` reads the logits from: [B, T, E] in `config.dtype`, and the state.

        Arguments and errors are those of a call.
        """
        batch, time = _check(tokens, state, segment_ids=segment_ids, positions=positions)
        last = jnp.full((batch,), -1, jnp.int32) if state is None else state.segment
        seen = jnp.zeros((batch,), jnp.int32) if state is None else state.seen
        place = documents.follow(segment_ids, last, seen, time)
        seen = place.seen
        if positions is None:
            positions = place.index
        else:
            seen = positions[:, -1] + 1

        with jax.named_scope("embedding"):
            table = constrain_params(self.embedding)[...]
            known = (tokens >= 0) & (tokens < self.config.vocab)
            # Not the nearest row, which would be silent: the loss of a wrong id is not a number.
            x = jnp.where(known[..., None], table[tokens], jnp.nan)
            x = constrain(x.astype(self.config.dtype), RESIDUAL)
        split = [nnx.split(module) for module in self.blocks]
        graphdefs = [graphdef for graphdef, _ in split]

        def repeat(x, layer):
            values, states = layer
            after = []
            for j, graphdef in enumerate(graphdefs):
                x, block_state = nnx.merge(graphdef, constrain_params(_layer(values[j])))(
                    x,
                    None if states is None else states[j],
                    segment_ids=segment_ids,
                    positions=positions,
                )
                after.append(block_state)
            return x, tuple(after)

        values = tuple(values for _, values in split)
        states = None if state is None else state.blocks
        x, blocks = jax.lax.scan(
            remat.computed_again(repeat, self.config.remat), x, (values, states)
        )
        return x, LanguageModelState(blocks, place.last, seen)

    @jax.named_scope("head")
    def head(self, x: Float[Array, "*B E"]) -> Float[Array, "*B Q"]:
        """Logits (fp32) of what `hidden` returns, or of any of its positions: `norm(x) head`.

        Args:
            x: [..., E].

        Returns:
            [..., Q].
        """
        x = self.norm(x)
        if self.head_kernel is None:
            kernel = constrain_params(self.embedding)[...].astype(x.dtype).T
        else:
            kernel = constrain_params(self.head_kernel)[...].astype(x.dtype)
        logits = jnp.matmul(x, kernel, preferred_element_type=jnp.float32)
        return constrain(logits, ("batch", "time", "vocab")) if logits.ndim == 3 else logits


def _stack(build: Callable[[nnx.Rngs], Block], repeats: int, rngs: nnx.Rngs) -> Block:
    """One block that holds the parameters of `repeats` independent ones, with a leading axis."""
    graphdefs = []

    def initial(key: Array) -> Any:
        graphdef, values = nnx.split(build(nnx.Rngs(key)))
        graphdefs.append(graphdef)
        return values

    values = jax.vmap(initial)(jax.random.split(rngs.params(), repeats))
    block = nnx.merge(graphdefs[0], values)
    for _, node in nnx.iter_graph(block):
        if isinstance(node, nnx.Param):
            # A parameter of a plain Flax layer names no axes: every device holds it whole.
            axes = node.get_metadata().get("axes", (None,) * (node[...].ndim - 1))
            node.set_metadata(axes=("layers", *axes))
    return block


def _layer(values: PyTree) -> PyTree:
    """One slice of stacked parameters, its axes no longer led by "layers"."""

    def unstacked(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(axes=variable.get_metadata()["axes"][1:])

    return jax.tree.map(unstacked, values, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _check(
    tokens: Array, state: LanguageModelState | None, **beside: Array | None
) -> tuple[int, int]:
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer) or tokens.shape[1] == 0:
        raise ValueError(
            "tokens must be integers [batch, time] with at least one token, got"
            f" {tokens.dtype}{list(tokens.shape)}"
        )
    for name, array in beside.items():
        if array is not None and array.shape != tokens.shape:
            raise ValueError(
                f"{name} must have the shape of tokens {tokens.shape}, got {array.shape}"
            )
    if state is not None and state.segment.shape[0] != tokens.shape[0]:
        raise ValueError(
            f"the state is for a batch of {state.segment.shape[0]}, tokens for {tokens.shape[0]}"
        )
    return tokens.shape
