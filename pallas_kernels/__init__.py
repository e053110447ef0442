"""Pallas kernels of memjax, one package an op. Imports nothing but JAX."""
