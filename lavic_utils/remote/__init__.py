"""What comes over a network: the published files, product images, chat services."""
