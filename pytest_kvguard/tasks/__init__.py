"""The tasks this package ships, by name."""
