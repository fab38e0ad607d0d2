"""Generative adversarial networks, and autoencoders with an adversarial regulariser."""
