"""Every row of the zoo beside an oracle: `test_zoo.py` holds them equal, docs/zoo.md lists them.

python -m tests.contracts.zoo > docs/zoo.md
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from memjax import miras
from memjax.miras import zoo
from memjax.miras.forms import dual, linear
from tests.contracts import scenes
from tests.contracts.rules import RuleCase
from tests.oracles import miras as oracle
from tests.oracles import recurrences

TIME, KEY, VALUE = 21, 6, 5
FORMS = ("recurrent", "chunkwise", "step")
HEAD = 64  # dimension of keys and values for bytes and operations


# Matrix memories: the gates that a paper has, and the rates of its recurrence.
def _rates(random, low, high, *shape):
    return random.uniform(low, high, (TIME, *shape))


def _linear_attention(random):
    return {}, ()


def _retnet(random):
    return {"retain": np.full(TIME, 0.9)}, (0.9,)


def _gla(random):
    a = _rates(random, 0.2, 1.0, KEY)
    return {"retain": a}, (a,)


def _mamba2(random):
    dt = _rates(random, 0.01, 1.5)
    return {"lr": dt, "retain": np.exp(-2.0 * dt)}, (dt, 2.0)


def _delta_net(random):
    b = _rates(random, 0.0, 2.0)
    return {"lr": b}, (b,)


def _gated_delta_net(random):
    a, b = _rates(random, 0.0, 1.0), _rates(random, 0.0, 2.0)
    return {"lr": b, "retain": a}, (b, a)


def _kda(random):
    a, b = _rates(random, 0.0, 1.0, KEY), _rates(random, 0.0, 2.0)
    return {"lr": b, "retain": a}, (b, a)


def _longhorn(random):
    th = _rates(random, 0.1, 20.0)
    return {"lr": th}, (th,)


def _rwkv7(random):
    a, b = _rates(random, 0.5, 1.0, KEY), _rates(random, 0.0, 1.0, KEY)
    w = random.normal(size=(TIME, KEY))
    return {"lr": b, "retain": a, "write": w}, (a, b, w)


def _mesa_net(random):
    b, g, raw = _rates(random, 0.0, 1.0), _rates(random, 0.8, 1.0), random.normal(size=KEY)
    return {"lr": b, "retain": g, "ridge": raw}, (b, g, np.log1p(np.exp(raw)))


MATRIX = {
    "linear_attention": _linear_attention, "retnet": _retnet, "gla": _gla, "mamba2": _mamba2,
    "delta_net": _delta_net, "gated_delta_net": _gated_delta_net, "kda": _kda,
    "longhorn": _longhorn, "rwkv7": _rwkv7, "mesa_net": _mesa_net,
}  # fmt: skip


@functools.cache
def matrix_results(name: str, form: str, block: int | None = None):
    """(y, state) of a matrix row in float64, and what its paper's recurrence gives."""
    random = np.random.default_rng(0)
    q, k = random.normal(size=(2, TIME, KEY))
    k /= np.linalg.norm(k, axis=1, keepdims=True)
    if name == "longhorn":
        k = 3 * k  # its step is stable for keys of any length
    v, start = random.normal(size=(TIME, VALUE)), random.normal(size=(VALUE, KEY))
    if name == "mesa_net":
        start = np.zeros_like(start)  # its W_0 is always 0
    gates, rates = MATRIX[name](random)
    want = getattr(recurrences, name)(q, k, v, *rates, start)
    slow = {"ridge": jnp.asarray(gates.pop("ridge"))[None]} if "ridge" in gates else {}
    gates = {"lr": np.ones(TIME)} | gates
    gates = miras.Gates(**{g: jnp.asarray(value)[None, :, None] for g, value in gates.items()})
    weights = miras.Weights((jnp.asarray(start.T)[None],), slow)
    rule = getattr(zoo, name)()
    which = scenes.forms_of(scenes.FORMS)[form]
    options = {"block": block} if block else {}

    def run(q, k, v, gates):
        state = miras.start(rule, weights, 1)
        ids = jnp.zeros((1, TIME), jnp.int32) if form == "step" else None
        return which(rule, state, q, k, v, gates, segment_ids=ids, **options)

    y, state = scenes.quick_jit(run)(*(jnp.asarray(x)[None, :, None] for x in (q, k, v)), gates)
    return (y[0, :, 0], state.weights[0][0, 0].T), want


# Deep memories: the row at a small size, and the oracle's reading of it.
def _deep(name, case_options=None, **fields):
    expansion = {} if name == "ttt_linear" else {"expansion": 2}
    rule = getattr(zoo, name)(chunk=5, **expansion)
    defaults = {"chunk": 5, "norm": True, "residual": True, "momentum": False}
    return RuleCase(name, rule, oracle.Rule(**defaults | fields), **case_options or {})


_free, _slow = {"retain": None, "scale": True}, {"rate": 0.2}
_shared = {"rate": 0.2, "shares": True}
DEEP = (
    _deep("titans", momentum=True),
    _deep("ttt_linear", _free),
    _deep("ttt_mlp", _free),
    _deep("moneta", _slow, bias="lp", retention="lq"),
    _deep("yaad", {"threshold": (0.5, 1.5)}, bias="huber switch"),
    _deep("memora", retention="simplex"),
    _deep("dla", bias="dot"),
    _deep("swdt", _shared, bias="dot", features=("taylor_exp", 2), window=4),
    _deep("deep_omega_transformer", _shared, features=("taylor_exp", 2), window=4),
    _deep("omega_net", _shared, features=("polynomial", 2), window=4),
    _deep("atlas", _shared, features=("polynomial", 2), window=4, momentum=True, learner="muon"),
    _deep(
        "lact", {"retain": None}, structure="gated_mlp", activation="silu", bias="dot",
        retention="renormalise", momentum=True, learner="by chunk", read="chunk", norm=False,
        residual=False,
    ),
    _deep("self_referential_titans", norm=False, learner="delta", read="chunk"),
    _deep("continuum", {"retain": None}, norm=False, residual=False, read="chunk"),
)  # fmt: skip


def _relative(got, want) -> float:
    """The worst error of any leaf, relative to its largest entry."""
    errors = []
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        errors.append(np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-3))
    return max(errors)


def errors() -> dict[str, dict[str, float]]:
    """The worst relative error of outputs and state of every row and form, in float64."""
    found = {}
    with jax.enable_x64(True):
        for name in MATRIX:
            found[name] = {form: _relative(*matrix_results(name, form)) for form in FORMS}
        for case in DEEP:
            state, stream, ids = scenes.scene(case)
            want = oracle.run(case.oracle, scenes.to_oracle(state), *stream, ids)
            want = (want[0], scenes.moving(want[2]))
            found[case.name] = {}
            for form in FORMS:
                which = scenes.forms_of(scenes.FORMS)[form]
                start = scenes.cast(state, jnp.float64)
                y, last = scenes.run(which, case, start, stream, ids)
                found[case.name][form] = _relative((y, scenes.moving(last)), want)
            scenes.forget()
    return found


def operations(rule: miras.Rule, tokens: int) -> float:
    """Floating-point operations of the products of `chunkwise`, forward, per token and head."""
    shape = (1, tokens, 1)
    key = jax.ShapeDtypeStruct((*shape, HEAD), jnp.float32)
    gates = _gates(rule, lambda *more: jax.ShapeDtypeStruct((*shape, *more), jnp.float32))

    def run(q, k, v, gates):
        state = miras.start(rule, rule.init(jax.random.key(0), HEAD, HEAD), 1)
        # Tiles that hold no boundary, which is what a caller should see to.
        return miras.trace(rule, state, q, k, v, gates, aligned=True, loss=False)

    return _count(jax.make_jaxpr(run)(key, key, key, gates)) / tokens


def _gates(rule: miras.Rule, make) -> miras.Gates:
    channels = (HEAD,) if rule.learner.exchanges else ()
    window = rule.learner.window
    return miras.Gates(
        lr=make(*channels),
        momentum=make() if rule.learner.needs_momentum else None,
        retain=make(*channels) if rule.retention.needs_retain else None,
        threshold=make() if rule.bias.needs_threshold else None,
        window=make(window) if window > 1 else None,
        write=make(HEAD) if rule.learner.exchanges else None,
    )


def _count(jaxpr) -> float:
    """Operations of all products in a jaxpr, loops as often as they turn."""
    if isinstance(jaxpr, ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2.0 * depth * equation.outvars[0].aval.size
        elif name == "scan":
            total += equation.params["length"] * _count(equation.params["jaxpr"])
        elif name == "custom_linear_solve":
            total += _count(equation.params["jaxprs"].solve)
        else:
            for value in equation.params.values():
                if isinstance(value, ClosedJaxpr | Jaxpr):
                    total += _count(value)
    return total


def state_bytes(rule: miras.Rule) -> int:
    """Bytes of a state of one row and head in fp32, all that is carried."""

    def start():
        state = miras.start(rule, rule.init(jax.random.key(0), HEAD, HEAD), 1)
        return state._replace(begin=(), slow={})

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(start)))


def how(rule: miras.Rule) -> str:
    """What `chunkwise` computes a rule by."""
    if rule.learner.solves:
        return "conjugate gradients"
    if linear.fits(rule, miras.Gates(lr=jnp.ones((1, 1, 1)))):
        return "closed"
    if rule.learner.closes:
        return "by chunk"
    return "dual" if dual.fits(rule) else "by token"


def table() -> str:
    """docs/zoo.md."""
    found = errors()
    lines = [
        "# The zoo",
        "",
        "Every row of `memjax.miras.zoo`: its parts, how `chunkwise` computes it, the worst error",
        "of outputs and state against an oracle in NumPy, relative to the largest entry, in",
        f"float64; and for a head of dimension {HEAD}, with the row's defaults: the bytes that a",
        "state carries in fp32, and the floating-point operations of the products of",
        "`chunkwise` per token, forward. Written by",
        "`python -m tests.contracts.zoo > docs/zoo.md`.",
        "",
        "| row | structure | bias | retention | learner | read | chunk | form | recurrent |"
        " chunkwise | step | state | operations |",
        "|---|---|---|---|---|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in found.items():
        rule = getattr(zoo, name)()
        parts = (rule.structure, rule.bias, rule.retention, rule.learner)
        tokens = max(rule.chunk, 64)
        cells = [
            f"`{name}`",
            *(f"`{_short(part)}`" for part in parts),
            rule.read,
            str(rule.chunk),
            how(rule),
            *(f"{row[form]:.0e}" for form in FORMS),
            f"{state_bytes(rule):,}",
            f"{operations(rule, tokens):,.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "* read: after or before a token is written, or as its chunk began.",
        "* form, of `chunkwise`: closed, the WY form of online matrix memories; dual, no weights",
        "  per token; by token, one set of weights at a time, where steps or links bend; by chunk,",
        "  weights change at chunk ends only; conjugate gradients, a solve for each query.",
        "* Errors are of the small sizes that the tests use; rows differ in sizes and gates.",
        "* A state holds the weights of its chunk's start besides the current ones, but where",
        "  chunks are of one token.",
    ]
    return "\n".join(lines)


def _short(part) -> str:
    """A part with its numbers, and with other fields that do not have their defaults."""
    fields = []
    for name, field in part.__dataclass_fields__.items():
        value = getattr(part, name)
        try:
            default = getattr(type(part)(), name)
        except TypeError:
            default = field.default
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if (number and name != "scale") or value != default:
            shown = _short(value) if hasattr(value, "__dataclass_fields__") else repr(value)
            fields.append(f"{name}={shown}")
    return f"{type(part).__name__}({', '.join(fields)})"


if __name__ == "__main__":
    print(table())
