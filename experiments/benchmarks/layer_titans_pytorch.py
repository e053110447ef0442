"""Child process: titans-pytorch's NeuralMemory, forward and backward, for one shape.

Needs torch and titans-pytorch, and nothing of memjax.
"""

import harness


def build(spec: dict):
    """Builds the layer and warms it up.

    Args:
        spec: batch, tokens, dim, heads, depth, expansion, chunk, threads; options: further
            arguments of its NeuralMemory.
    Returns:
        (info, answer): `answer(steps=n)` gives tokens, seconds and the memory so far.
    """
    import torch  # here, so that a missing package is reported and not a crash
    from titans_pytorch import MemoryMLP, NeuralMemory

    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    head_dim = spec["dim"] // spec["heads"]
    memory = NeuralMemory(
        dim=spec["dim"],
        heads=spec["heads"],
        dim_head=head_dim,
        chunk_size=spec["chunk"],
        model=MemoryMLP(head_dim, spec["depth"], float(spec["expansion"])),
        **spec["options"],
    )

    def step(x, weights):
        memory.zero_grad(set_to_none=True)
        x.grad = None
        y, _ = memory(x)
        loss = (y * weights).sum()
        loss.backward()
        return loss

    def inputs(tokens):
        x = torch.randn(spec["batch"], tokens, spec["dim"], requires_grad=True)
        return x, torch.randn(spec["batch"], tokens, spec["dim"])

    step(*inputs(2 * spec["chunk"]))  # loads what the library loads late, as compiling does
    x, weights = inputs(spec["tokens"])
    watched = harness.Memory()
    loss = step(x, weights)
    # The layer keeps a first copy of the memory's weights, which gets no gradient and is not used.
    gradients = [p.grad for p in memory.parameters() if p.grad is not None]
    if not all(bool(torch.isfinite(g).all()) for g in (loss, x.grad, *gradients)):
        raise FloatingPointError("titans-pytorch: loss or gradients are not finite")
    info = {
        "versions": harness.versions("titans-pytorch", "torch", "tensordict", "assoc-scan"),
        "parameters": sum(g.numel() for g in gradients),
        "threads": torch.get_num_threads(),
    }
    del gradients, loss

    def run():
        step(x, weights)

    return info, harness.timed(run, spec["batch"] * spec["tokens"], watched)


if __name__ == "__main__":
    harness.serve(build)
