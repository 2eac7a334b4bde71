"""Training of routers, translators and exit heads, the model frozen."""
