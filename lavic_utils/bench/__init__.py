"""Measuring: speed beside a plain reference, memory on a card, and what a run will need."""
