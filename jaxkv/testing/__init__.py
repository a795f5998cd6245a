"""Test kit for cache layouts, backends and connectors."""
