"""What torch lacks for tensors and trees of them."""
