"""Traces of serving requests, replayed through the scheduler side alone: what a host pool of a size would
do."""
