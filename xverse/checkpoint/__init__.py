"""FOLDER <-> MODEL. Safetensors, pickles, GGUF and the hubs; nothing in a folder is executed."""
