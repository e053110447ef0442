"""Decays of the tokens of tiles, all from log gates: none, one a head, or one a channel.

With `g_i` the sum of log decays since the tile, or the token's document in it, began, the decay
between two tokens is `P[i, j] = exp(g_i - g_j)`, at most 1 for j <= i. Each class gives

    scores(asked, k)   for each (x, own): sum_c x_i P[i, j] k_j for j <= i, without token i's own
                       decay, and j = i, where `own` is False; 0 elsewhere
    read(x, own)       x_i P[i, 0]
    write(k)           P[C, j] k_j, of the last token's document
    keep(w, at)        P[C, 0] w, for the tiles that `at` picks of all
"""

import functools

import jax.numpy as jnp
from jax import lax

from pallas_kernels.tiles import column, dot, order

NEVER = -1e30  # exp of it is 0, and so is its derivative
NEAR = 8  # tokens whose decays are taken pair by pair: the sublanes of a register


def make(decay, like, document, compute):
    """The decays of some tiles.

    Args:
        decay: None, log decays of heads [tiles, C], or of channels [tiles, C, K].
        like: keys [tiles, C, K].
        document: number of each token's document in its tile [., C]; None = one document. The tiles
            are those of one head after another.
        compute: dtype of the products' operands.
    """
    kinds = {None: NoDecay, 2: HeadDecay, 3: ChannelDecay}
    return kinds[None if decay is None else decay.ndim](decay, like, document, compute)


class NoDecay:
    def __init__(self, decay, like, document, compute):
        self.row, self.col = order(like.shape[1])
        self.compute = compute
        self.down = self.same = None
        if document is not None:
            document = jnp.concatenate([document] * (like.shape[0] // document.shape[0]))
            self.across, self.down = document[:, None, :], column(document)
            self.same = self.down == self.across

    def mask(self, own: bool):
        """Which j a token i sees."""
        mask = self.row >= self.col if own else self.row > self.col
        return mask if self.same is None else mask & self.same

    def last(self, x):
        """Rows of the last token's document, others 0."""
        return x if self.same is None else jnp.where(self.down == self.down[:, -1:], x, 0.0)

    def scores(self, asked, k):
        return [
            jnp.where(self.mask(own), dot(x, k, "nt", self.compute), 0.0) for x, own in asked
        ]  # fmt: skip

    def read(self, x, own: bool):
        return x

    def write(self, k):
        return self.last(k)

    def keep(self, w, at):
        return w


def sums(decay, upto):
    """Sums of log decays [tiles, C] over the tokens `upto` [C, C] says, exact in fp32."""
    return _sums(decay, upto.astype(jnp.float32), (((1,), (1,)), ((), ())))


def _sums(upto, decay, axes):
    """Sums of log decays over the tokens that `upto` says, exact in fp32."""
    return lax.dot_general(
        upto,
        decay,
        axes,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


class HeadDecay(NoDecay):
    def __init__(self, decay, like, document, compute):
        super().__init__(decay, like, document, compute)
        upto = self.mask(True).astype(jnp.float32)
        if document is None:  # all tiles in one product
            total = sums(decay, upto)[:, None, :]
        else:
            total = _sums(decay[:, None, :], upto, (((2,), (2,)), ((0,), (0,))))
        self.row_sums, self.sums = total, column(total[:, 0])
        self.before = self.sums - column(decay)
        self.between = functools.cache(self._between)

    def _between(self, own: bool):
        to = self.sums if own else self.before
        return jnp.exp(jnp.where(self.mask(own), to - self.row_sums, NEVER))

    def scores(self, asked, k):
        return [dot(x, k, "nt", self.compute) * self.between(own) for x, own in asked]

    def read(self, x, own: bool):
        return jnp.exp(self.sums if own else self.before) * x

    def write(self, k):
        return self.last(jnp.exp(self._behind()) * k)

    def _behind(self):
        """Log decay from each token to the last; of other documents, which `last` drops, 0."""
        return self.last(self.sums[:, -1:] - self.sums)

    def keep(self, w, at):
        return at(jnp.exp(self.sums[:, -1:])) * w


class ChannelDecay(HeadDecay):
    """Pairs of one block of 8 one by one; of two neighbouring blocks of 8, 16, ... tokens by the
    decays to the end of the left one and from there, neither above 1: nothing of size C C K."""

    def __init__(self, decay, like, document, compute):
        NoDecay.__init__(self, decay, like, document, compute)
        upto = jnp.broadcast_to(self.mask(True), (decay.shape[0], *self.row.shape))
        self.sums = _sums(upto.astype(jnp.float32), decay, (((2,), (1,)), ((0,), (0,))))
        self.before = self.sums - decay

    def keep(self, w, at):
        return at(jnp.exp(column(self.sums[:, -1]))) * w

    def scores(self, asked, k):
        found = [self._near(x, own, k) for x, own in asked]
        for level in range(NEAR.bit_length() - 1, k.shape[1].bit_length() - 1):
            pair = self.row >> level + 1 == self.col >> level + 1
            right = (self.row[:, :1] >> level) & 1 == 1
            end = self._left_end(self.sums, 1 << level)
            same = self._same_as_left_end(level)
            left = jnp.exp(jnp.where(~right & same, end - self.sums, NEVER)) * k
            for i, (x, own) in enumerate(asked):
                to = self.sums if own else self.before
                x = jnp.exp(jnp.where(right & same, to - end, NEVER)) * x
                found[i] += jnp.where(pair, dot(x, left, "nt", self.compute), 0.0)
        return found

    def _left_end(self, x, size: int):
        """[tiles, C, K]: of each pair of blocks the row that ends the left one."""
        tiles, count, width = x.shape
        pairs = x.reshape(tiles, count // (2 * size), 2 * size, width)
        row = pairs[:, :, size - 1 : size]
        return jnp.broadcast_to(row, pairs.shape).reshape(x.shape)

    def _same_as_left_end(self, level: int):
        """[tiles, C, 1]: whether a token's document is the one that ends the left block."""
        if self.same is None:
            return True
        end = (self.row >> level + 1 << level + 1) + (1 << level) - 1 == self.col
        number = jnp.sum(jnp.where(end, self.across, 0), axis=2, keepdims=True)
        return number == self.down

    def _near(self, x, own: bool, k):
        """Scores inside the blocks of 8."""
        to = self.sums if own else self.before
        place = self.row[:, :1] & (NEAR - 1)
        total = 0.0
        for back in range(0 if own else 1, NEAR):
            seen = place >= back
            if self.same is not None and back:
                seen = seen & (self.down == jnp.roll(self.down, back, axis=1))
            sums, then = (jnp.roll(z, back, axis=1) if back else z for z in (self.sums, k))
            product = x * jnp.exp(jnp.where(seen, to - sums, NEVER)) * then
            value = jnp.sum(product, axis=2, keepdims=True)
            total += jnp.where(self.row - self.col == back, value, 0.0)
        return total
