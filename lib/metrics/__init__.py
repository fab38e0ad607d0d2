"""Measuring images: `measure(real, generated, net)` and the metrics that it is made of; `python -m lib.metrics A B`."""
