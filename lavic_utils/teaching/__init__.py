"""What notebooks show of prompts, targets and differences: small measurements, and figures."""
