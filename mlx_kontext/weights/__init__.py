"""Reading and writing checkpoints: gate, formats, strict filling, our own folder."""
