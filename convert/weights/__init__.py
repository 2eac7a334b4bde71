"""Weight maps: arrangements of source tensors (`takes`) and the names of common decoder parts (`parts`)."""
