"""autorank: smaller and faster copies of a trained PyTorch network, found by search."""
