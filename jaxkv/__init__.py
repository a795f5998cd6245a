"""KV cache offloading for JAX serving stacks."""
