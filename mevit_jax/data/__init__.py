"""Batches for training and evaluation, with Grain."""

from absl import logging

# Grain warns on every import with a jaxlib before 0.11 that workers cannot be profiled.
logging.get_absl_logger().addFilter(lambda record: 'worker profiling requires' not in str(record.msg))
