"""The terminal UI. It draws and asks; models live in the engine's process, so nothing here imports mlx."""
