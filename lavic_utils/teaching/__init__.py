"""What the notebooks show of prompts, targets and differences."""
