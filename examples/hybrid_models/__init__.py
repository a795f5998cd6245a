"""Reference models in plain JAX over paged caches, for the examples, the demo and the tests."""

from hybrid_models.weights import load_model as load_model
from hybrid_models.weights import load_tokenizer as load_tokenizer
