"""Weight maps: how source tensors are arranged (`takes`) and which names common parts of a decoder have (`parts`)."""
