"""Contracts that every rule, mixer and kernel keeps; each check is shown to fail under a fault."""
