"""The operators: torch.library registration, autograd, argument checks and the public functions, one op a file."""
