"""OTHER LIBRARIES -> US. Adapters for the libraries that XVERSE users already call."""
