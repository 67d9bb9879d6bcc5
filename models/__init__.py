"""Generative models, their guides, and their closed forms."""
