"""Toy worlds: a grammar of prompts, a renderer, a verifier, and a small model trained on them."""
