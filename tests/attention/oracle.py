"""Attention written from its definition: one query and head at a time, NumPy float64."""

import numpy as np


def document_starts(segment_ids, time):
    """For each token, where its document begins."""
    begin = np.zeros(time, int)
    for t in range(1, time):
        same = segment_ids is None or segment_ids[t] == segment_ids[t - 1]
        begin[t] = begin[t - 1] if same else t
    return begin


def visible(segment_ids, time, window, sinks=0):
    """Bool [T, T]: which tokens s a token t sees."""
    begin = document_starts(segment_ids, time)
    see = np.zeros((time, time), bool)
    for t in range(time):
        for s in range(begin[t], t + 1):
            see[t, s] = t - s < window or s - begin[t] < sinks
    return see


def attend(q, k, v, *, window, sinks=0, prefix=None, segment_ids=None):
    """softmax(q k / sqrt(D)) v over what each token sees; k and v [B, T, G, D]."""
    batch, time, heads, dim = q.shape
    group = heads // k.shape[2]
    y = np.zeros(q.shape)
    for b in range(batch):
        see = visible(None if segment_ids is None else segment_ids[b], time, window, sinks)
        for t, h in np.ndindex(time, heads):
            keys, values = k[b, see[t], h // group], v[b, see[t], h // group]
            if prefix is not None:
                keys = np.concatenate([prefix[0][:, h // group], keys])
                values = np.concatenate([prefix[1][:, h // group], values])
            score = keys @ q[b, t, h] / np.sqrt(dim)
            weight = np.exp(score - score.max())
            y[b, t, h] = weight @ values / weight.sum()
    return y
