"""Trained models for users: prediction, StableHLO export, and shared models with a model card."""
