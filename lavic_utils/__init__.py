"""LaViC companion: one small module a stage, from data to tables (Jeon et al., KDD 2025)."""

import warnings

# Said by libraries about themselves (transformers' own deprecation, tqdm without widgets); they would stand in notebooks.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
warnings.filterwarnings("ignore", message=".*IProgress.*")
