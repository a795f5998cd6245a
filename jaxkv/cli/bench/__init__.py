"""``jaxkv bench``: one command for each question. Of a question X, ``X_command`` parses and explains,
``X_measure`` measures, ``X_report`` prints tables and ``X_plot`` draws."""

from jaxkv.cli.bench.parser import add_parser

__all__ = ["add_parser"]
