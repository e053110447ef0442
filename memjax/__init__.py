"""memjax: neural memory for JAX and TPU."""

__version__ = "0.1.0"
