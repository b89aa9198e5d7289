"""The model: needs jax and flax alone, and knows no mesh, no data and no training."""
