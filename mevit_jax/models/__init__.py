"""The model. Depends on jax and flax only; independent of meshes, data and training."""
