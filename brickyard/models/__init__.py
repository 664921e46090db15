"""Network layers and small architectures, which anyone may import."""
