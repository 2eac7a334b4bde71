"""Training of routers, exit heads and translators on a frozen model."""
