"""Matrix memories as their papers write them: one head, one token at a time, in float64 NumPy.

The state is the papers' S [V, K]: o_t = S_t q_t, the transpose of memjax's W. Each function takes
q, k [T, K], v [T, V], the rates its paper has, and S_0, and returns (o [T, V], S_T). Nothing here
is derived from a loss: these are the recurrences that the rules of `miras.zoo` must reproduce.
"""

import numpy as np


def _scan(step, state, q, *tokens):
    outputs = []
    for q_t, *token in zip(q, *tokens, strict=True):
        state = step(state, *token)
        outputs.append(state @ q_t)
    return np.array(outputs), state


def linear_attention(q, k, v, state):
    """S_t = S_{t-1} + v k^T (Katharopoulos et al., arXiv:2006.16236)."""
    return _scan(lambda s, k, v: s + np.outer(v, k), state, q, k, v)


def retnet(q, k, v, decay, state):
    """S_t = g S_{t-1} + v k^T, g a number (arXiv:2307.08621, equation 6)."""
    return _scan(lambda s, k, v: decay * s + np.outer(v, k), state, q, k, v)


def gla(q, k, v, decay, state):
    """S_t = S_{t-1} diag(a_t) + v k^T (arXiv:2312.06635, equation 3)."""
    return _scan(lambda s, k, v, a: s @ np.diag(a) + np.outer(v, k), state, q, k, v, decay)


def mamba2(q, k, v, step, rate, state):
    """h_t = exp(-dt A) h_{t-1} + dt x B^T, y = h C (arXiv:2405.21060): k is B, q is C, v is x."""
    return _scan(
        lambda h, b, x, dt: np.exp(-dt * rate) * h + dt * np.outer(x, b), state, q, k, v, step
    )


def delta_net(q, k, v, beta, state):
    """S_t = S_{t-1} (I - b k k^T) + b v k^T (arXiv:2406.06484, equation 1)."""
    eye = np.eye(k.shape[1])
    return _scan(
        lambda s, k, v, b: s @ (eye - b * np.outer(k, k)) + b * np.outer(v, k), state, q, k, v, beta
    )


def gated_delta_net(q, k, v, beta, decay, state):
    """S_t = S_{t-1} (a (I - b k k^T)) + b v k^T (arXiv:2412.06464, equation 10)."""
    eye = np.eye(k.shape[1])
    return _scan(
        lambda s, k, v, b, a: s @ (a * (eye - b * np.outer(k, k))) + b * np.outer(v, k),
        state, q, k, v, beta, decay,
    )  # fmt: skip


def kda(q, k, v, beta, decay, state):
    """S_t^T = (I - b k k^T) diag(a) S_{t-1}^T + b k v^T (arXiv:2510.26692, equation 1)."""
    eye = np.eye(k.shape[1])
    return _scan(
        lambda s, k, v, b, a: ((eye - b * np.outer(k, k)) @ np.diag(a) @ s.T).T
        + b * np.outer(v, k),
        state, q, k, v, beta, decay,
    )  # fmt: skip


def longhorn(q, k, v, rate, state):
    """S_t = argmin ||S - S_{t-1}||^2 / (2 th) + ||S k - v||^2 / 2 (arXiv:2407.14207, section 3).

    Solved as it stands: S (I / th + k k^T) = S_{t-1} / th + v k^T.
    """
    eye = np.eye(k.shape[1])
    return _scan(
        lambda s, k, v, th: (s / th + np.outer(v, k)) @ np.linalg.inv(eye / th + np.outer(k, k)),
        state, q, k, v, rate,
    )  # fmt: skip


def rwkv7(q, k, v, decay, rate, write, state):
    """S_t = S_{t-1} (diag(w) - k^T (a o k)) + v k~^T (arXiv:2503.14456, equation 17)."""
    return _scan(
        lambda s, k, v, a, b, w: s @ (np.diag(a) - np.outer(k, b * k)) + np.outer(v, w),
        state, q, k, v, decay, rate, write,
    )  # fmt: skip


def mesa_net(q, k, v, rate, decay, ridge, state):
    """o = G (H + diag(ridge))^-1 q, H = g H + b k k^T, G = g G + b v k^T (arXiv:2506.05233)."""
    outputs, squares = [], np.zeros((k.shape[1], k.shape[1]))
    for q_t, k_t, v_t, b, g in zip(q, k, v, rate, decay, strict=True):
        squares = g * squares + b * np.outer(k_t, k_t)
        state = g * state + b * np.outer(v_t, k_t)
        outputs.append(state @ np.linalg.solve(squares + np.diag(ridge), q_t))
    return np.array(outputs), state
