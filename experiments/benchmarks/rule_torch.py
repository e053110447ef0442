"""Child process: the PyTorch reference of a rule, forward and backward, for one shape.

Needs torch and flash-linear-attention, whose references run on any processor, and nothing of
memjax. Its kernels, which are Triton's, need a GPU.
"""

import importlib

import harness

# The fastest form of each that `fla.ops` has in plain PyTorch.
PEERS = {
    "linear_attention": "linear_attn.naive.naive_chunk_linear_attn",
    "retnet": "simple_gla.naive.naive_chunk_simple_gla",
    "gla": "gla.naive.naive_recurrent_gla",
    "mamba2": "simple_gla.naive.naive_chunk_simple_gla",
    "delta_net": "delta_rule.naive.delta_rule_chunkwise",
    "gated_delta_net": "gated_delta_rule.naive.naive_chunk_gated_delta_rule",
    "kda": "kda.naive.naive_chunk_kda",
    "rwkv7": "generalized_delta_rule.dplr.naive.dplr_chunkwise",
    "mesa_net": "mesa_net.naive.naive_mesa_net_CG",
}


def answers(rule: str, function, torch):
    """`inputs -> y`, with memjax's shapes and without the scale 1 / sqrt(D) of queries."""

    def swapped(x):  # [B, T, H, ...] <-> [B, H, T, ...]
        return x.transpose(1, 2)

    def linear_attention(q, k, v, lr, retain, write):
        return function(q, k, lr[..., None] * v, scale=1.0)

    def retnet(q, k, v, lr, retain, write):
        return function(q, k, lr[..., None] * v, retain.log(), scale=1.0)[0]

    def gla(q, k, v, lr, retain, write):
        return function(q * q.shape[-1] ** 0.5, k, lr[..., None] * v, retain.log())[0]

    def delta_net(q, k, v, lr, retain, write):
        y, _ = function(*map(swapped, (q * q.shape[-1] ** 0.5, k, v, lr)))
        return swapped(y)

    def gated_delta_net(q, k, v, lr, retain, write):
        return function(q, k, v, retain.log(), lr, scale=1.0)[0]

    def rwkv7(q, k, v, lr, retain, write):
        y, _ = function(*map(swapped, (q * q.shape[-1] ** 0.5, write, v, -k, lr * k, retain.log())))
        return swapped(y)

    def mesa_net(q, k, v, lr, retain, write):
        ridge = torch.ones(q.shape[-2:])
        y, _, _ = function(q, k, v, retain.log(), ridge, lr, chunk_size=64)
        return y

    return {"mamba2": retnet, "kda": gated_delta_net}.get(rule) or locals()[rule]


def build(spec: dict):
    """Runs the reference once.

    Args:
        spec: rule: one of PEERS; batch, tokens, heads, head_dim, threads.
    Returns:
        (info, answer): `answer(steps=n)` gives tokens, seconds and the memory so far.
    """
    import rule_inputs  # here, so that a missing package is reported and not a crash
    import torch

    module, name = PEERS[spec["rule"]].rsplit(".", 1)
    function = getattr(importlib.import_module(f"fla.ops.{module}"), name)
    torch.set_num_threads(spec["threads"])
    forward = answers(spec["rule"], function, torch)
    drawn = rule_inputs.draw(spec)
    names = ("q", "k", "v", "lr", "retain", "write")
    inputs = {name: torch.from_numpy(drawn[name]).requires_grad_() for name in names}

    def step():
        for x in inputs.values():
            x.grad = None
        y = forward(**inputs)
        y.square().sum().backward()
        return y.detach()

    watched = harness.Memory()
    loss = step().double().square().sum()
    gradients = [x.grad for x in inputs.values() if x.grad is not None]
    if not all(bool(torch.isfinite(g).all()) for g in (loss, *gradients)):
        raise FloatingPointError(f"{PEERS[spec['rule']]}: loss or gradients are not finite")
    info = {
        "versions": harness.versions("flash-linear-attention", "torch"),
        "loss": loss.item(),
    }
    del gradients, loss

    return info, harness.timed(step, spec["batch"] * spec["tokens"], watched)


if __name__ == "__main__":
    harness.serve(build)
