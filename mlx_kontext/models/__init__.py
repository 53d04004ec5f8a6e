"""The four networks of FLUX.1 Kontext. Each file stands alone: configuration, layers, model, top to bottom."""
