"""A page to try the trained models: requests, pictures, likelihoods."""
