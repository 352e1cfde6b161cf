"""Texts, images and sound → arrays."""
