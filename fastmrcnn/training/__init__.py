"""The rooms of `fastmrcnn.train`: its options, recipes, optimizer, checkpoints and records."""
