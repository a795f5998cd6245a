"""Reference models in plain JAX over paged caches, for the examples, the demo and the tests."""

from jaxkv_models.weights import load_model as load_model
from jaxkv_models.weights import load_tokenizer as load_tokenizer
