"""Early exits: the exit decision, the loop over layer groups, and the KV cache of skipped layers."""
