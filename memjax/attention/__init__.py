"""Attention as pure functions: windows with sinks, persistent prefixes and ring-buffer caches."""

from memjax.attention import documents

__all__ = ["documents"]
