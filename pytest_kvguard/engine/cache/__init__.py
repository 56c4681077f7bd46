"""What rows hold while they are decoded: one cache for each layer of a group of rows."""
