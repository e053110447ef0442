"""The rules that the contracts run over: one table, each rule beside the oracle's reading of it.

A new rule joins by a line here. Sizes are tiny; chunks are 1, below, around and above the length.
"""

from dataclasses import dataclass

from memjax import miras
from memjax.miras import zoo
from tests.oracles import miras as oracle


@dataclass(frozen=True)
class RuleCase:
    """A rule, the oracle's rule, the sizes of a head, and which optional gates it is given."""

    name: str
    rule: miras.Rule
    oracle: oracle.Rule
    key: int = 4
    value: int = 4
    heads: int = 2
    retain: str | None = "scalar"  # scalar, channel, or None
    scale: bool = False
    threshold: tuple[float, float] | None = None  # the range of the threshold gate
    shares: bool = False  # whether the window gate is given
    rate: float = 1.0  # on lr; lower where depth or chunk make a memory chaotic at lr near 1/4


def _matrix(bias, retention, learner, **options):
    return miras.Rule(miras.matrix(), bias, retention, learner, **options)


_l2, _dot, _decay, _none = miras.l2(), miras.dot(), miras.decay(), miras.none()
_gd, _momentum = miras.gd(), miras.momentum()
_first = miras.decay(before="gradient")

ENGINE = (
    RuleCase(
        "delta",
        _matrix(_l2, _none, _gd, chunk=4),
        oracle.Rule(chunk=4, momentum=False),
        value=5,
        retain=None,
    ),
    RuleCase(
        "gated_delta_online",
        _matrix(_l2, _decay, _gd, chunk=1),
        oracle.Rule(chunk=1, momentum=False),
        key=5,
    ),
    RuleCase(
        "linear_attention_channelwise",
        _matrix(_dot, _decay, _momentum, chunk=5),
        oracle.Rule(chunk=5, bias="dot"),
        value=6,
        retain="channel",
        scale=True,
    ),
    RuleCase(
        "matrix_before",
        _matrix(_l2, _decay, _momentum, chunk=4, read="before"),
        oracle.Rule(chunk=4, read="before"),
        retain="channel",
        scale=True,
    ),
    RuleCase(
        "gated_delta_net",
        _matrix(_l2, _first, _gd, chunk=1),
        oracle.Rule(chunk=1, momentum=False, first=True),
        value=5,
    ),
    RuleCase(
        "kda_before",
        _matrix(_l2, _first, _gd, chunk=1, read="before"),
        oracle.Rule(chunk=1, momentum=False, first=True, read="before"),
        retain="channel",
    ),
    RuleCase(
        "channelwise_delta",
        _matrix(_l2, _decay, _gd, chunk=1),
        oracle.Rule(chunk=1, momentum=False),
        retain="channel",
        heads=1,
    ),
    RuleCase(
        "longhorn",
        _matrix(_l2, _none, miras.implicit(), chunk=1),
        oracle.Rule(chunk=1, momentum=False, implicit=True),
        retain=None,
        rate=5.0,
    ),
    RuleCase(
        "gated_linear_attention",
        _matrix(_dot, _decay, _gd, chunk=1),
        oracle.Rule(chunk=1, bias="dot", momentum=False),
        value=5,
        retain="channel",
    ),
    RuleCase(
        "retention_before",
        _matrix(_dot, _decay, _gd, chunk=1, read="before"),
        oracle.Rule(chunk=1, bias="dot", momentum=False, read="before"),
    ),
    RuleCase(
        "matrix_first",
        _matrix(_l2, _first, _momentum, chunk=5),
        oracle.Rule(chunk=5, first=True),
        retain="channel",
        scale=True,
    ),
    RuleCase(
        "mlp_first",
        miras.Rule(
            miras.mlp(depth=2, expansion=2, residual=True), _l2, _first, _gd, chunk=4
        ),
        oracle.Rule(chunk=4, residual=True, momentum=False, first=True),
        scale=True,
    ),
    RuleCase(
        "titans_linear",
        zoo.titans(depth=1, chunk=5),
        oracle.Rule(chunk=5, norm=True, residual=True),
    ),
    RuleCase(
        "titans",
        zoo.titans(depth=2, expansion=2, norm=False, residual=False, chunk=4),
        oracle.Rule(chunk=4),
        value=5,
    ),
    RuleCase(
        "titans_3",
        zoo.titans(depth=3, expansion=1, chunk=20),
        oracle.Rule(chunk=20, norm=True, residual=True),
        key=8,
        value=8,
        rate=0.2,
    ),
    RuleCase(
        "titans_4",
        zoo.titans(depth=4, expansion=1, chunk=5),
        oracle.Rule(chunk=5, norm=True, residual=True),
        key=8,
        value=8,
        rate=0.1,
    ),
    RuleCase(
        "titans_full_online",
        miras.Rule(
            miras.mlp(depth=2, expansion=2, activation="silu", norm=True, residual=True),
            _l2, _decay, _momentum, chunk=1, read="before",
        ),
        oracle.Rule(chunk=1, activation="silu", norm=True, residual=True, read="before"),
    ),
    RuleCase(
        "mlp_channelwise",
        miras.Rule(miras.mlp(depth=1, norm=True), _l2, _decay, _momentum, chunk=4),
        oracle.Rule(chunk=4, norm=True),
        key=5,
        value=6,
        retain="channel",
    ),
    RuleCase(
        "mlp_dot_before",
        miras.Rule(
            miras.mlp(depth=3, expansion=1, activation="relu", residual=True),
            _dot, _decay, _gd, chunk=4, read="before",
        ),
        oracle.Rule(
            chunk=4, activation="relu", residual=True, bias="dot", momentum=False, read="before"
        ),
        heads=1,
        scale=True,
    ),
    RuleCase(
        "ttt_linear",
        zoo.ttt_linear(chunk=4),
        oracle.Rule(chunk=4, norm=True, residual=True, momentum=False),
        retain=None,
        scale=True,
    ),
    RuleCase(
        "ttt_mlp",
        zoo.ttt_mlp(chunk=5),
        oracle.Rule(chunk=5, norm=True, residual=True, momentum=False),
        retain=None,
        scale=True,
        rate=0.5,
    ),
)  # fmt: skip

# The other parts, as few cases as hold each of them once and beside different others.
PARTS = (
    RuleCase(
        "moneta_gated",
        miras.Rule(
            miras.gated_mlp(expansion=1, norm=True, residual=True),
            miras.lp(p=3.0, sharpness=5.0), miras.lq(q=4.0), _gd, chunk=4,
        ),
        oracle.Rule(
            chunk=4, structure="gated_mlp", activation="silu", norm=True, residual=True,
            bias="lp", p=3, sharpness=5, retention="lq", q=4, momentum=False,
        ),
        key=6,
        value=6,
        rate=0.02,
    ),
    RuleCase(
        "omega_net",
        miras.Rule(
            miras.mlp(depth=2, expansion=1, features=miras.polynomial(2)),
            _l2, _decay, miras.omega(3), chunk=4,
        ),
        oracle.Rule(chunk=4, features=("polynomial", 2), window=3),
        key=3,
        value=5,
        shares=True,
        rate=0.3,
    ),
    RuleCase(
        "yaad",
        miras.Rule(
            miras.mlp(depth=2, expansion=2, norm=True, residual=True),
            miras.huber("switch"), _decay, _gd, chunk=5,
        ),
        oracle.Rule(chunk=5, norm=True, residual=True, bias="huber switch", momentum=False),
        key=6,
        value=6,
        threshold=(1.0, 4.0),
        rate=0.1,
    ),
    RuleCase(
        "huber_norm",
        _matrix(miras.huber("norm"), _decay, _momentum, chunk=4),
        oracle.Rule(chunk=4, bias="huber norm"),
        retain="channel",
        threshold=(0.5, 2.0),
        scale=True,
    ),
    RuleCase(
        "huber_coordinate",
        miras.Rule(
            miras.matrix(features=miras.elu1()),
            miras.huber("coordinate"), _first, _gd, chunk=1, read="before",
        ),
        oracle.Rule(
            chunk=1, features=("elu1", 0), bias="huber coordinate", first=True, momentum=False,
            read="before",
        ),
        value=5,
        threshold=(0.3, 1.0),
    ),
    RuleCase(
        "robust_vector",
        miras.Rule(miras.vector(), miras.robust(), _decay, _momentum, chunk=4),
        oracle.Rule(chunk=4, structure="vector", bias="robust"),
        threshold=(0.1, 0.5),
    ),
    RuleCase(
        "memora",
        # without a norm: weights of one sign give outputs nearly alike, and it divides by how far
        # these are from each other
        miras.Rule(
            miras.mlp(depth=2, expansion=2, residual=True),
            _l2, miras.simplex(temperature=0.25, total=2.0), _gd, chunk=4,
        ),
        oracle.Rule(
            chunk=4, residual=True, retention="simplex", temperature=0.25, total=2, momentum=False
        ),
        rate=0.3,
    ),
    RuleCase(
        "elastic_net_before",
        miras.Rule(
            miras.matrix(features=miras.taylor_exp()),
            _l2, miras.elastic_net(0.2), _momentum, chunk=5, read="before",
        ),
        oracle.Rule(
            chunk=5, features=("taylor_exp", 2), retention="elastic_net", soft=0.2, read="before"
        ),
        key=3,
        scale=True,
        rate=0.5,
    ),
    RuleCase(
        "back_to_the_initial",
        miras.Rule(
            miras.mlp(depth=2, expansion=2), _l2, miras.decay(to="initial"), _momentum, chunk=4
        ),
        oracle.Rule(chunk=4, retention="initial"),
        scale=True,
    ),
    RuleCase(
        "back_to_the_initial_first",
        _matrix(_l2, miras.decay(before="gradient", to="initial"), _momentum, chunk=5),
        oracle.Rule(chunk=5, retention="initial", first=True),
        retain="channel",
    ),
    RuleCase(
        "atlas",
        miras.Rule(
            miras.mlp(depth=2, expansion=1, residual=True, features=miras.polynomial(2)),
            _l2, _decay, miras.omega(3, miras.muon()), chunk=4,
        ),
        oracle.Rule(
            chunk=4, residual=True, features=("polynomial", 2), window=3, learner="muon"
        ),
        key=3,
        value=3,
        shares=True,
        rate=0.3,
    ),
    RuleCase(
        "delta_momentum",
        miras.Rule(
            miras.mlp(depth=2, expansion=2), _l2, miras.decay(to="initial"),
            miras.delta_momentum(), chunk=4, read="chunk",
        ),
        oracle.Rule(chunk=4, retention="initial", learner="delta", read="chunk"),
        value=5,
        rate=0.1,
    ),
    RuleCase(
        "delta_gd",
        miras.Rule(
            miras.mlp(depth=2, expansion=2, residual=True), _l2, _decay, miras.delta_gd(), chunk=4
        ),
        oracle.Rule(chunk=4, residual=True, momentum=False, learner="delta"),
        scale=True,
        rate=0.5,
    ),
    RuleCase(
        "delta_gd_before",
        miras.Rule(
            miras.gated_mlp(expansion=1), _l2, miras.decay(to="initial"),
            miras.delta_gd(), chunk=5, read="before",
        ),
        oracle.Rule(
            chunk=5, structure="gated_mlp", activation="silu", momentum=False,
            retention="initial", learner="delta", read="before",
        ),
        value=5,
        rate=0.3,
    ),
    RuleCase(
        "delta_gd_by_channel",
        _matrix(_dot, _decay, miras.delta_gd(), chunk=4, read="chunk"),
        oracle.Rule(chunk=4, bias="dot", momentum=False, learner="delta", read="chunk"),
        retain="channel",
    ),
    RuleCase(
        "lact",
        miras.Rule(
            miras.gated_mlp(expansion=2), _dot, miras.renormalise(), miras.chunk_muon(), chunk=4,
            read="chunk",
        ),
        oracle.Rule(
            chunk=4, structure="gated_mlp", activation="silu", bias="dot",
            retention="renormalise", learner="by chunk", read="chunk",
        ),
        retain=None,
    ),
    RuleCase(
        "omega_by_chunk",
        _matrix(miras.huber("norm"), _none, miras.omega(4, miras.chunk_muon(steps=0)), chunk=3),
        oracle.Rule(chunk=3, bias="huber norm", window=4, learner="by chunk", steps=0),
        retain=None,
        threshold=(0.5, 2.0),
        shares=True,
    ),
    RuleCase(
        "omega_beyond_the_chunk",
        _matrix(miras.robust(), _decay, miras.omega(6, _gd), chunk=2),
        oracle.Rule(chunk=2, bias="robust", window=6, momentum=False),
        retain="channel",
        threshold=(0.1, 0.5),
        rate=0.3,
    ),
    RuleCase(
        "omega_online",
        _matrix(_l2, _decay, miras.omega(3, _gd), chunk=1),
        oracle.Rule(chunk=1, window=3, momentum=False),
        value=5,
        shares=True,
    ),
    RuleCase(
        "polynomial_online",
        miras.Rule(miras.matrix(features=miras.polynomial(2)), _l2, _decay, _gd, chunk=1),
        oracle.Rule(chunk=1, features=("polynomial", 2), momentum=False),
        key=3,
        value=5,
        rate=0.5,
    ),
    RuleCase(
        "dpfp_before",
        miras.Rule(
            miras.matrix(features=miras.dpfp(2)), _dot, _decay, _gd, chunk=1, read="before"
        ),
        oracle.Rule(chunk=1, features=("dpfp", 2), bias="dot", momentum=False, read="before"),
        key=3,
    ),
)  # fmt: skip

CASES = ENGINE + PARTS
BY_NAME = {case.name: case for case in CASES}

# Where a check concerns the engine and not the parts, these stand for all: a matrix memory with
# every gate, a deep one with momentum, one that reads before the write, one without momentum, the
# closed forms, one with a window and weights that are no sums, and one that steps by chunk.
FEW = tuple(
    BY_NAME[name]
    for name in ("matrix_before", "titans", "ttt_linear", "gated_delta_net", "kda_before",
                 "mlp_first", "atlas", "lact")
)  # fmt: skip
