"""Ahead-of-time cost estimates of compiled steps, for accelerators that this machine does not have."""
