"""A trained model for others: an artefact that runs without this package, and params to share, with a model card."""
