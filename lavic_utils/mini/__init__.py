"""The mini world: a rendered catalogue, its words, and the tiny LLaVA-NeXT that lives in it."""
