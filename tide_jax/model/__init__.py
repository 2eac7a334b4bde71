"""The decoder, described by each family's configuration; nothing here knows of exits."""
