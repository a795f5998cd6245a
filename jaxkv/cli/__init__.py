"""The `jaxkv` command."""
