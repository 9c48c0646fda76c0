"""Making it again: the driver of the notebooks, their stamps, the lock, the doctor."""
