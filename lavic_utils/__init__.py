"""LaViC companion: one small module a stage, from data to tables (Jeon et al., KDD 2025)."""

import os
import warnings

# Said by libraries about themselves (transformers' own deprecation, tqdm without widgets); they would stand in notebooks.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
warnings.filterwarnings("ignore", message=".*IProgress.*")
os.environ.setdefault(
    "TRANSFORMERS_VERBOSITY", "error"
)  # e.g. "sequence longer than": prompts are measured and cut here
