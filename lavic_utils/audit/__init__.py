"""What follows from the published figures, data and answers: read, scored and compared."""
