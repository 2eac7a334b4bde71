"""Settings of exits with a promised risk."""
