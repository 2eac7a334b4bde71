"""What config.json says, checked and read with every default resolved."""
