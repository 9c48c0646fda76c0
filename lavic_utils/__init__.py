"""LaViC companion: one small module a stage, from data to tables (Jeon et al., KDD 2025)."""
