"""vLLM's KV connector API for JAX serving loops."""
