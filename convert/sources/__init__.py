"""Where weights come from: directories, hub repositories, GGUF files, adapters."""
