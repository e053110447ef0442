"""Float64 NumPy oracles, from the equations alone: no code shared with what they judge."""
