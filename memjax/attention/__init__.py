"""Attention as pure functions: windows with sinks, persistent prefixes and ring-buffer caches."""

from memjax.attention import backends, window
from memjax.attention.window import Cache, Prefix, attend

__all__ = ["Cache", "Prefix", "attend", "backends", "window"]
