"""What follows from the published figures, files and answers: reading, scoring and comparing them."""
