"""The gated delta rule: `delta_rule`; `reference` says what it computes."""

from pallas_kernels.delta_rule.op import delta_rule

__all__ = ["delta_rule"]
