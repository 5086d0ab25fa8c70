"""The layouts in which checkpoints lie on disk, each read without loading it where that can be done."""
