"""Reader of GGUF, llama.cpp's file format."""
